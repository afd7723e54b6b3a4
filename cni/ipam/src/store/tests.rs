use std::{net::Ipv4Addr, sync::mpsc, time::Duration};

use super::*;
use crate::{Action, Eni, Limits, PodRef, Targets};

/// A journal whose writer breaks at the first batch.
struct Breaking;

impl Commits for Breaking {
    fn append(&mut self, _: &[u8]) -> Result<(), JournalError> {
        panic!("a fault");
    }

    fn rewrite(&mut self, _: &[Record]) -> Result<(), JournalError> {
        panic!("a fault");
    }

    fn wants_compaction(&self) -> bool {
        false
    }

    fn syncs(&self) -> u64 {
        0
    }
}

/// A journal on a real file whose disk hangs when it is told to.
struct Hanging {
    journal: Journal,
    entered: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
}

impl Commits for Hanging {
    fn append(&mut self, lines: &[u8]) -> Result<(), JournalError> {
        self.entered.send(()).ok();
        self.go_on.recv().ok();
        self.journal.append(lines)
    }

    fn rewrite(&mut self, snapshot: &[Record]) -> Result<(), JournalError> {
        self.journal.rewrite(snapshot)
    }

    fn wants_compaction(&self) -> bool {
        false
    }

    fn syncs(&self) -> u64 {
        self.journal.syncs()
    }
}

fn holder(n: u32) -> Holder {
    Holder {
        attachment: Attachment {
            container_id: format!("c{n}"),
            ifname: "eth0".into(),
        },
        network: "turnpike".into(),
        pod: PodRef {
            namespace: "shop".into(),
            name: format!("web-{n}"),
            uid: String::new(),
        },
        netns: format!("/run/netns/c{n}"),
    }
}

/// With an interface full of addresses.
fn pool() -> Pool {
    let mut pool = Pool::new(Config {
        limits: Limits {
            enis: 4,
            addresses_per_eni: 50,
        },
        targets: Targets::default(),
        cooldown: Duration::ZERO,
    });
    let eni = Eni {
        id: EniId::new("eni-1"),
        mac: "02:00:00:00:00:01".into(),
        device_index: 0,
        primary: Ipv4Addr::new(10, 0, 0, 4),
        subnet: "10.0.0.0/24".parse().unwrap(),
    };
    let addresses = (10..59).map(|n| Ipv4Addr::new(10, 0, 0, n)).collect();
    let mut log = Vec::new();
    let action = Action::Create { addresses: 49 };
    let intent = pool.begin(action, "t".into(), Moment(1), &mut log).unwrap();
    pool.finish(intent.id, Some(eni.clone()), addresses, Moment(1), &mut log);
    pool.ready(&eni.id);
    pool
}

#[tokio::test]
async fn those_who_come_while_a_commit_is_under_way_share_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let (entered, in_commit) = mpsc::channel();
    let (release, go_on) = mpsc::channel();
    let journal = Hanging {
        journal: Journal::open(folder.path()).unwrap().journal,
        entered,
        go_on,
    };
    let store = Store::start(pool(), Vec::new(), false, journal).unwrap();
    let (_, first) = store.lease(holder(0), Moment(2)).unwrap();
    in_commit.recv().unwrap();
    let others = (1..=40).map(|n| store.lease(holder(n), Moment(2)).unwrap());
    let others: Vec<_> = others.collect();
    release.send(()).unwrap();
    release.send(()).unwrap();
    first.done().await.unwrap();
    for (_, recording) in others {
        recording.done().await.unwrap();
    }
    assert_eq!(
        store.syncs(),
        2,
        "one for the first ADD, one for the other 40"
    );
}

#[tokio::test]
async fn a_writer_that_breaks_is_noticed_and_leaves_nobody_waiting() {
    let soon = Duration::from_secs(20);
    let store = Store::start(pool(), Vec::new(), false, Breaking).unwrap();
    let idle = tokio::time::timeout(Duration::ZERO, store.ended()).await;
    assert!(idle.is_err(), "it works");
    for n in 0..2 {
        let (_, recording) = store.lease(holder(n), Moment(2)).unwrap();
        let recorded = tokio::time::timeout(soon, recording.done()).await;
        let refused = recorded.expect("an answer").unwrap_err();
        assert!(
            refused.to_string().contains("could not be written"),
            "{refused}"
        );
    }
    let ended = tokio::time::timeout(soon, store.ended()).await;
    ended.expect("its end is told");
}
