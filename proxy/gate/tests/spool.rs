//! The spool on a real disk: durable, one chain across restarts, closed when it cannot write.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use sqlx::{Connection, SqliteConnection};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use turnpike_certs::{Authority, CredentialStore, KeyRequest, LEAF_LIFETIME, TrustBundle};
use turnpike_gate::spool::{NotRecorded, Reader, Spool, SpoolConfig, StoreError, Writer, now_ms};
use turnpike_ledger::{
    Entry, Event, Record, Report, Trust,
    record::{Attempt, Closed, End, Protocol, Verdict},
    verify,
};

const GATE: &str = "spiffe://cluster.local/ns/turnpike-system/sa/turnpike-gate";

/// A node's disk, and who may seal what is on it.
struct Disk {
    dir: TempDir,
    credentials: Arc<CredentialStore>,
    trust: Trust,
}

impl Disk {
    fn new() -> Self {
        let now = SystemTime::now();
        let authority = Authority::generate("cluster.local", 10 * LEAF_LIFETIME, now).unwrap();
        let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
        let signer = GATE.parse().unwrap();
        let request = KeyRequest::new(&signer).unwrap();
        let issued = authority
            .sign(request.csr_pem(), &signer, LEAF_LIFETIME, now)
            .unwrap();
        let credentials = request
            .into_credentials(&issued.chain, roots.clone())
            .unwrap();
        Self {
            dir: tempfile::tempdir().unwrap(),
            credentials: CredentialStore::new(credentials),
            trust: Trust { roots, signer },
        }
    }

    fn config(&self) -> SpoolConfig {
        SpoolConfig::new(self.dir.path(), "node-a")
    }

    fn small(&self, max_bytes: u64) -> SpoolConfig {
        SpoolConfig {
            max_bytes,
            ..self.config()
        }
    }

    async fn start(&self) -> Running {
        self.start_with(self.config()).await
    }

    async fn start_with(&self, config: SpoolConfig) -> Running {
        let (writer, spool) = self.open(config).await.unwrap();
        let cancel = CancellationToken::new();
        let task = tokio::spawn(writer.run(cancel.clone()));
        Running {
            spool,
            cancel,
            task,
        }
    }

    async fn open(&self, config: SpoolConfig) -> Result<(Writer, Spool), StoreError> {
        Writer::open(config, self.credentials.clone(), Arc::default()).await
    }

    async fn entries(&self) -> Vec<Entry> {
        let mut reader = Reader::open(self.dir.path()).await.unwrap();
        reader.after(0, 1_000_000).await.unwrap()
    }

    async fn events(&self) -> Vec<Event> {
        let decode = |entry: &Entry| Record::decode(&entry.body).unwrap().event;
        self.entries().await.iter().map(decode).collect()
    }

    async fn report(&self) -> Report {
        verify("node-a", &self.entries().await, &self.trust, None, now_ms())
    }

    /// On the file, with no gate running.
    async fn sql(&self, text: &'static str) {
        let url = format!("sqlite:{}", self.dir.path().join("record.sqlite").display());
        let mut connection = SqliteConnection::connect(&url).await.unwrap();
        sqlx::query(text).execute(&mut connection).await.unwrap();
        connection.close().await.unwrap();
    }
}

struct Running {
    spool: Spool,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    async fn record(&self, event: Event) {
        self.spool.record(event).await.unwrap();
    }

    /// Dropped where it stands, as a kill leaves it: no checkpoint, no farewell.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
    }
}

fn opened(connection: &str) -> Event {
    Event::Opened(Attempt {
        connection: connection.into(),
        pod: None,
        source: "10.0.1.5:40000".parse().unwrap(),
        destination: "203.0.113.10:443".parse().unwrap(),
        protocol: Protocol::Tls,
        verdict: Verdict::Allowed,
        reason: None,
        rule: None,
        name: None,
        answer_chain: vec![],
        claimed: None,
        request: None,
        assurance: None,
        count: 1,
    })
}

fn closed(connection: &str) -> Event {
    Event::Closed(Closed {
        connection: connection.into(),
        bytes_out: 1,
        bytes_in: 1,
        duration_ms: 1,
        end: End::Finished,
        reason: None,
        requests: 0,
    })
}

#[tokio::test]
async fn many_writers_make_one_chain_that_verifies() {
    let disk = Disk::new();
    let running = disk.start().await;
    let writers: Vec<_> = (0..200)
        .map(|n| {
            let spool = running.spool.clone();
            tokio::spawn(async move {
                let id = format!("c-{n}");
                let first = spool.record(opened(&id)).await.unwrap();
                let last = spool.record_end(closed(&id)).await.unwrap();
                assert!(first < last);
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    running.stop().await;
    let report = disk.report().await;
    assert!(report.holds(), "{:?}", report.problems);
    assert_eq!(
        report.unsealed(),
        1,
        "sealed at the stop, but for the checkpoint itself"
    );
    assert!(report.entries >= 401);
}

#[tokio::test]
async fn a_crash_is_marked_and_the_chain_goes_on() {
    let disk = Disk::new();
    let running = disk.start().await;
    running.record(opened("ends")).await;
    running.record(opened("lost")).await;
    running.spool.record_end(closed("ends")).await.unwrap();
    running.kill().await;

    let running = disk.start().await;
    running.stop().await;
    let events = disk.events().await;
    assert!(matches!(events[0], Event::Restart { .. }));
    assert!(matches!(events[4], Event::Restart { .. }), "{events:?}");
    assert_eq!(
        events[5],
        Event::Lost {
            connection: "lost".into()
        }
    );
    let report = disk.report().await;
    assert!(report.holds(), "{:?}", report.problems);
    assert_eq!((report.restarts, report.lost), (2, 1));
}

#[tokio::test]
async fn a_full_disk_denies_and_the_gap_is_on_record() {
    let disk = Disk::new();
    let small = disk.small(200_000);
    let running = disk.start_with(small).await;
    let mut refused = 0;
    for n in 0..2000 {
        match running.spool.record(opened(&format!("c-{n}"))).await {
            Ok(_) if refused == 0 => {}
            Ok(_) => break,
            Err(NotRecorded::Full) => refused += 1,
            Err(other) => panic!("{other}"),
        }
        if refused == 5 {
            break;
        }
    }
    assert_eq!(refused, 5, "the spool grew beyond its bound");
    running
        .spool
        .record_end(closed("c-0"))
        .await
        .expect("an end has room");
    running.stop().await;

    let running = disk.start().await;
    running.spool.drop_one();
    running.record(opened("again")).await;
    running.stop().await;
    let report = disk.report().await;
    assert!(report.holds(), "{:?}", report.problems);
    assert_eq!(report.noted_gaps, 6);
}

fn denied(connection: &str) -> Event {
    let Event::Opened(attempt) = opened(connection) else {
        unreachable!()
    };
    Event::Denied(Attempt {
        verdict: Verdict::Denied,
        ..attempt
    })
}

#[tokio::test]
async fn refusals_fill_half_of_the_spool_and_leave_the_rest_to_what_needs_it() {
    let disk = Disk::new();
    let small = disk.small(400_000);
    let running = disk.start_with(small).await;
    let mut refused = 0;
    for n in 0..2000 {
        if running.spool.record(denied(&format!("d-{n}"))).await == Err(NotRecorded::Full) {
            refused += 1;
        }
    }
    assert!(refused > 0, "the spool grew beyond its bound");
    running.record(opened("c")).await;
    running.stop().await;
    let report = disk.report().await;
    assert!(report.holds(), "{:?}", report.problems);
    assert_eq!(report.noted_gaps, refused);
}

#[tokio::test]
async fn much_that_is_dropped_is_told_of_once_a_checkpoint() {
    let disk = Disk::new();
    let seldom = SpoolConfig {
        checkpoint_interval: Duration::from_secs(3600),
        ..disk.config()
    };
    let running = disk.start_with(seldom).await;
    for n in 0..50 {
        running.spool.drop_one();
        running.record(opened(&format!("c-{n}"))).await;
    }
    running.stop().await;
    let events = disk.events().await;
    let gaps: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Gap { entries, .. } => Some(*entries),
            _ => None,
        })
        .collect();
    let checkpoints = events
        .iter()
        .filter(|it| matches!(it, Event::Checkpoint(_)));
    assert_eq!((gaps, checkpoints.count()), (vec![50], 1));
}

#[tokio::test]
async fn a_spool_without_any_room_starts_and_is_emptied() {
    let disk = Disk::new();
    let small = disk.small(100_000);
    let running = disk.start_with(small.clone()).await;
    running.record(opened("lost")).await;
    let Event::Closed(long) = closed("x") else {
        unreachable!()
    };
    let long = |bytes| {
        let reason = Some("x".repeat(bytes));
        Event::Closed(Closed {
            reason,
            ..long.clone()
        })
    };
    for bytes in [100_000, 1000] {
        let mut written = 0;
        while running.spool.record_end(long(bytes)).await.is_ok() {
            written += 1;
        }
        assert!(written > 0, "what is too long ends all that follow");
    }
    let shortest = || Event::Lost {
        connection: String::new(),
    };
    while running.spool.record_end(shortest()).await.is_ok() {}
    running.kill().await;
    let before = disk.entries().await;

    let running = disk.start_with(small).await;
    let refused = running.spool.record(opened("again")).await;
    assert!(refused.is_err(), "{refused:?}");
    running.spool.acknowledged(before.last().unwrap().sequence);
    running.record(opened("again")).await;
    running.stop().await;
    let events = &disk.events().await[1..];
    assert!(matches!(events[0], Event::Restart { .. }), "{events:?}");
    assert!(
        matches!(&events[1], Event::Lost { connection } if connection == "lost"),
        "{events:?}"
    );
    assert!(matches!(&events[2], Event::Opened(it) if it.connection == "again"));
}

#[tokio::test]
async fn what_was_acknowledged_is_known_to_the_next_gate() {
    let disk = Disk::new();
    let running = disk.start().await;
    assert_eq!(running.spool.unacknowledged(), 1, "the restart");
    for n in 0..5 {
        let denied = denied(&format!("d-{n}"));
        running.record(denied).await;
    }
    running.spool.acknowledged(4);
    assert_eq!(running.spool.unacknowledged(), 2);
    running.stop().await;

    // The checkpoint of the stop and the second restart have come to it.
    let running = disk.start().await;
    assert_eq!(running.spool.unacknowledged(), 4);
    running.stop().await;
    // As an older gate has left it, and its central record has let it forget the first.
    disk.sql("DELETE FROM meta WHERE name = 'acknowledged'")
        .await;
    disk.sql("DELETE FROM entries WHERE sequence < 4").await;
    let running = disk.start().await;
    assert_eq!(running.spool.unacknowledged(), 7);
    running.stop().await;
}

#[tokio::test]
async fn a_changed_file_is_found_and_a_broken_end_is_not_continued() {
    let disk = Disk::new();
    let running = disk.start().await;
    for n in 0..5 {
        running.record(opened(&format!("c-{n}"))).await;
    }
    running.stop().await;
    disk.sql(
        "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), '203.0.113.10', '203.0.113.11') AS BLOB) \
         WHERE sequence = 3",
    )
    .await;
    assert!(!disk.report().await.holds());
    disk.sql(
        "UPDATE entries SET hash = randomblob(32) WHERE sequence = (SELECT max(sequence) FROM entries)",
    )
    .await;
    let result = disk.open(disk.config()).await;
    assert!(
        matches!(result, Err(StoreError::Broken { .. })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_spool_has_one_gate_of_one_node() {
    let disk = Disk::new();
    let running = disk.start().await;
    let again = disk.open(disk.config()).await;
    assert!(matches!(again, Err(StoreError::InUse(_))));
    running.stop().await;
    let config = SpoolConfig::new(disk.dir.path(), "node-b");
    let other = disk.open(config).await;
    assert!(matches!(other, Err(StoreError::OtherNode { .. })));
}

#[tokio::test]
async fn entries_wait_unsealed_for_the_first_certificate() {
    let mut disk = Disk::new();
    let later = std::mem::replace(&mut disk.credentials, CredentialStore::empty());
    let quick = SpoolConfig {
        checkpoint_interval: Duration::from_millis(1),
        ..disk.config()
    };
    let running = disk.start_with(quick.clone()).await;
    running.record(opened("early")).await;
    running.stop().await;
    assert_eq!(disk.report().await.sealed, 0);
    disk.credentials = later;
    let running = disk.start_with(quick).await;
    running.stop().await;
    let report = disk.report().await;
    assert!(report.holds() && report.sealed >= 3, "{report:?}");
}
