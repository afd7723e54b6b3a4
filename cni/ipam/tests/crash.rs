//! The store on real files: killed at any moment, cut at any byte, on a full disk.
//!
//! The inner tests are started by the outer ones as processes of their own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use turnpike_ipam::{
    Action, Attachment, Config, Eni, EniId, Holder, Limits, Moment, PodRef, Store, Tail, Targets,
    journal::{Journal, JournalError},
};

const FOLDER: &str = "TURNPIKE_TEST_FOLDER";
const SEED: &str = "TURNPIKE_TEST_SEED";
const ADDRESSES: u32 = 49;

fn config() -> Config {
    Config {
        limits: Limits {
            enis: 4,
            addresses_per_eni: ADDRESSES + 1,
        },
        targets: Targets::default(),
        cooldown: Duration::ZERO,
    }
}

fn open(folder: &Path) -> Store {
    let store = Store::open(folder, config(), "boot", Moment(1)).unwrap();
    store
        .read(|pool| pool.enis().map(|eni| eni.id.clone()).collect::<Vec<_>>())
        .iter()
        .for_each(|eni| store.ready(eni));
    store
}

/// Gives a new pool an interface full of addresses.
async fn fill(store: &Store) {
    let eni = Eni {
        id: EniId::new("eni-1"),
        mac: "02:00:00:00:00:01".into(),
        device_index: 0,
        primary: Ipv4Addr::new(10, 0, 0, 4),
        subnet: "10.0.0.0/24".parse().unwrap(),
    };
    let gained = (0..ADDRESSES)
        .map(|n| Ipv4Addr::new(10, 0, 0, 10 + n as u8))
        .collect();
    let (made, recorded) = store
        .change(|pool, log| {
            let action = Action::Create {
                addresses: ADDRESSES,
            };
            let intent = pool.begin(action, "t".into(), Moment(1), log).unwrap();
            pool.finish(intent.id, Some(eni.clone()), gained, Moment(1), log);
            eni.id
        })
        .await;
    recorded.unwrap();
    store.ready(&made);
}

fn holder(id: &str) -> Holder {
    Holder {
        attachment: attachment(id),
        network: "turnpike".into(),
        pod: PodRef {
            namespace: "shop".into(),
            name: id.into(),
            uid: String::new(),
        },
        netns: format!("/run/netns/{id}"),
    }
}

fn attachment(id: &str) -> Attachment {
    Attachment {
        container_id: id.into(),
        ifname: "eth0".into(),
    }
}

fn leases(store: &Store) -> BTreeMap<String, Ipv4Addr> {
    store.read(|pool| {
        let leases = pool.leases();
        leases
            .map(|it| (it.holder.attachment.container_id.clone(), it.address))
            .collect()
    })
}

async fn add(store: &Store, id: &str) -> Option<Ipv4Addr> {
    let (lease, recording) = store.lease(holder(id), Moment(2)).ok()?;
    recording.done().await.ok()?;
    Some(lease.address)
}

#[tokio::test]
async fn a_journal_cut_at_any_byte_keeps_all_that_was_acknowledged_before() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.journal");
    let mut acknowledged = Vec::new();
    {
        let store = open(folder.path());
        fill(&store).await;
        for n in 0..12 {
            add(&store, &format!("c{n}")).await.unwrap();
            if n % 3 == 2 {
                store
                    .release(&attachment(&format!("c{}", n - 1)), Moment(3))
                    .await;
            }
            acknowledged.push((fs::metadata(&file).unwrap().len(), leases(&store)));
        }
    }
    let bytes = fs::read(&file).unwrap();
    let (first, _) = acknowledged[0];
    for cut in first as usize..=bytes.len() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("pool.journal"), &bytes[..cut]).unwrap();
        fs::write(folder.path().join("pool.journal.new"), b"half a compaction").unwrap();
        let found = leases(&open(folder.path()));
        let at = acknowledged
            .iter()
            .rposition(|(length, _)| *length <= cut as u64)
            .unwrap();
        let whole = acknowledged
            .iter()
            .position(|(length, _)| *length == cut as u64);
        if whole.is_some() {
            assert_eq!(found, acknowledged[at].1, "cut at {cut}");
        }
        // Between two acknowledgements: the earlier state, or one whole record on the way to the
        // next, and never an address in two hands.
        let unique: BTreeSet<_> = found.values().collect();
        assert_eq!(unique.len(), found.len());
        let both = acknowledged
            .get(at + 1)
            .map_or(&acknowledged[at].1, |(_, next)| next);
        for (id, address) in &acknowledged[at].1 {
            assert!(
                found.get(id) == Some(address) || !both.contains_key(id),
                "{id} at {cut}"
            );
        }
    }
}

#[tokio::test]
async fn after_a_torn_tail_the_journal_goes_on_whole() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(folder.path());
        fill(&store).await;
        add(&store, "c1").await.unwrap();
    }
    let file = folder.path().join("pool.journal");
    let mut bytes = fs::read(&file).unwrap();
    bytes.extend([b'x'; 5_000]);
    fs::write(&file, &bytes).unwrap();
    {
        let store = open(folder.path());
        add(&store, "c2").await.unwrap();
    }
    let opened = Journal::open(folder.path()).unwrap();
    assert_eq!((opened.tail, opened.cut), (Tail::Clean, 0));
}

#[tokio::test]
async fn many_adds_at_once_get_an_address_each() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(open(folder.path()));
    fill(&store).await;
    let adds: Vec<_> = (0..40)
        .map(|n| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { add(&store, &format!("c{n}")).await.unwrap() })
        })
        .collect();
    let mut addresses = BTreeSet::new();
    for add in adds {
        assert!(
            addresses.insert(add.await.unwrap()),
            "one address, two pods"
        );
    }
}

#[test]
fn only_one_agent_has_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let _first = Journal::open(folder.path()).unwrap();
    assert!(matches!(
        Journal::open(folder.path()),
        Err(JournalError::Locked(_))
    ));
}

#[tokio::test]
async fn a_damaged_journal_is_kept_beside_and_its_sound_part_used() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(folder.path());
        fill(&store).await;
        add(&store, "c1").await.unwrap();
        add(&store, "c2").await.unwrap();
    }
    let file = folder.path().join("pool.journal");
    let mut bytes = fs::read(&file).unwrap();
    let second = bytes
        .windows(4)
        .rposition(|window| window == b"\"c1\"")
        .unwrap();
    bytes[second] ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert!(leases(&open(folder.path())).is_empty());
    assert_eq!(
        fs::read(folder.path().join("pool.journal.damaged-0")).unwrap(),
        bytes
    );
}

/// Of a lease whose note may have been in what was lost, a restart must not say that its ADD never
/// ended.
#[tokio::test]
async fn what_a_damaged_journal_does_not_tell_the_end_of_is_a_stranger_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pool.journal");
    {
        let store = open(folder.path());
        fill(&store).await;
        for id in ["c1", "c2"] {
            add(&store, id).await.unwrap();
            let note = format!("note of {id}");
            store.note(&attachment(id), note).await.unwrap();
        }
        add(&store, "c3").await.unwrap();
    }
    let strangers = |store: &Store| {
        let is_stranger = |id| {
            store.read(|pool| {
                let lease = pool.lease_of(&attachment(id))?;
                Some(lease.holder.is_stranger())
            })
        };
        ["c1", "c2", "c3"].map(is_stranger)
    };
    let whole = strangers(&open(folder.path()));
    assert_eq!(whole, [Some(false); 3], "nothing was lost");
    let bytes = fs::read(&file).unwrap();
    let note = bytes.windows(10).position(|it| it == b"note of c2");
    for cut_too in [false, true] {
        let mut damaged = bytes.clone();
        damaged[note.unwrap()] ^= 1;
        if cut_too {
            // Nothing whole follows: it looks like a write that did not end.
            damaged.truncate(note.unwrap() + 20);
        }
        fs::write(&file, damaged).unwrap();
        for start in 1..3 {
            let found = strangers(&open(folder.path()));
            let expected = [Some(false), Some(true), None];
            assert_eq!(found, expected, "cut too: {cut_too}, start {start}");
        }
    }
}

fn inner(test: &str, folder: &Path, seed: u64) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]);
    command.env(FOLDER, folder).env(SEED, seed.to_string());
    command
}

fn inner_folder() -> PathBuf {
    std::env::var_os(FOLDER)
        .expect("started by an outer test")
        .into()
}

/// What a killed process had said.
#[derive(Debug, Default)]
struct Told {
    held: BTreeMap<String, Ipv4Addr>,
    /// A DEL was begun, and its end not told.
    leaving: BTreeSet<String>,
    gone: BTreeSet<String>,
}

impl Told {
    fn hear(&mut self, line: &str) {
        let words: Vec<_> = line.split(' ').collect();
        match words[..] {
            ["added", id, address] => {
                self.held.insert(id.into(), address.parse().unwrap());
            }
            ["deleting", id] => {
                self.leaving.insert(id.into());
            }
            ["deleted", id] => {
                self.held.remove(id);
                self.leaving.remove(id);
                self.gone.insert(id.into());
            }
            _ => {}
        }
    }

    fn check(&self, found: &BTreeMap<String, Ipv4Addr>) {
        let unique: BTreeSet<_> = found.values().collect();
        assert_eq!(unique.len(), found.len(), "one address in two hands");
        for (id, address) in &self.held {
            let kept = found.get(id) == Some(address);
            assert!(kept || self.leaving.contains(id), "{id} lost {address}");
        }
        for id in &self.gone {
            assert!(!found.contains_key(id), "{id} came back");
        }
    }
}

#[test]
fn what_was_acknowledged_outlives_kill_9_at_any_moment() {
    let folder = tempfile::tempdir().unwrap();
    let mut heard = 0;
    let mut told = Told::default();
    for seed in 0..25 {
        let mut child = inner("inner_busy", folder.path(), seed)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let stop_after = 1 + (seed * seed * 7) % 900;
        for (n, line) in lines.enumerate() {
            // All that was written before the kill is read: the pipe keeps it.
            let Ok(line) = line else { break };
            told.hear(&line);
            heard += 1;
            if n as u64 == stop_after {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        let found = leases(&open(folder.path()));
        told.check(&found);
        told.held = found;
        told.leaving.clear();
    }
    assert!(heard > 5_000, "too little happened: {heard}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "started by what_was_acknowledged_outlives_kill_9_at_any_moment"]
async fn inner_busy() {
    let store = Arc::new(open(&inner_folder()));
    if store.read(|pool| pool.enis().count()) == 0 {
        fill(&store).await;
    }
    let seed = std::env::var(SEED).unwrap();
    // What the last run held goes first.
    for id in leases(&store).into_keys() {
        println!("deleting {id}");
        store.release(&attachment(&id), Moment(3)).await;
        println!("deleted {id}");
    }
    let workers: Vec<_> = (0..8)
        .map(|worker| {
            let (store, seed) = (Arc::clone(&store), seed.clone());
            tokio::spawn(async move {
                for n in 0.. {
                    let id = format!("s{seed}-w{worker}-n{n}");
                    if let Some(address) = add(&store, &id).await {
                        println!("added {id} {address}");
                    }
                    if n >= 4 {
                        let id = format!("s{seed}-w{worker}-n{}", n - 4);
                        println!("deleting {id}");
                        store.release(&attachment(&id), Moment(3)).await;
                        println!("deleted {id}");
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
}

#[test]
fn on_a_full_disk_adds_fail_and_dels_do_not() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test mounts a small disk: run it as root"
    );
    let folder = tempfile::tempdir().unwrap();
    let inner = inner("inner_full_disk", folder.path(), 0);
    // The mount is the process's own and goes with it.
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private"])
        .arg(inner.get_program());
    command.args(inner.get_args()).env(FOLDER, folder.path());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{error}"
    );
}

#[tokio::test]
#[ignore = "started by on_a_full_disk_adds_fail_and_dels_do_not"]
async fn inner_full_disk() {
    let folder = inner_folder();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=128k", "none"])
        .arg(&folder)
        .status()
        .unwrap();
    assert!(mounted.success());
    let store = open(&folder);
    fill(&store).await;
    let kept = add(&store, "kept").await.unwrap();
    add(&store, "leaves").await.unwrap();
    let filler = folder.join("filler");
    while fs::write(filler.with_extension(format!("{}", next())), [1; 512]).is_ok() {}
    // Some records still fit into the page that the journal has.
    let mut refused = None;
    for n in 0..200 {
        let (_, recording) = store.lease(holder(&format!("x{n}")), Moment(2)).unwrap();
        if let Err(error) = recording.done().await {
            store.undo(&attachment(&format!("x{n}"))).await;
            refused = Some(error.to_string());
            break;
        }
        store
            .release(&attachment(&format!("x{n}")), Moment(2))
            .await;
    }
    let refused = refused.expect("the disk is full");
    assert!(refused.contains("No space left"), "{refused}");
    let released = store.release(&attachment("leaves"), Moment(3)).await;
    assert!(released.lease.is_some() && !released.recorded);
    assert_eq!(leases(&store), BTreeMap::from([("kept".to_owned(), kept)]));

    for entry in fs::read_dir(&folder).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("filler") {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    let later = add(&store, "later").await.expect("there is room again");
    drop(store);
    let expected = BTreeMap::from([("kept".to_owned(), kept), ("later".to_owned(), later)]);
    assert_eq!(leases(&open(&folder)), expected);
}

fn next() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
