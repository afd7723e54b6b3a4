//! The spool on a real disk: durable, one chain across restarts, closed when it cannot write.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use turnpike_certs::{Authority, CredentialStore, KeyRequest, LEAF_LIFETIME, TrustBundle};
use turnpike_gate::{
    metrics::Metrics,
    spool::{NotRecorded, Reader, Spool, SpoolConfig, StoreError, Writer, now_ms},
};
use turnpike_ledger::{
    Entry, Event, Record, Report, Trust,
    record::{Attempt, Closed, End, Protocol, Verdict},
    verify,
};

const GATE: &str = "spiffe://cluster.local/ns/turnpike-system/sa/turnpike-gate";

fn credentials() -> (Arc<CredentialStore>, Trust) {
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
    (CredentialStore::new(credentials), Trust { roots, signer })
}

struct Running {
    spool: Spool,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

async fn start(config: SpoolConfig, store: &Arc<CredentialStore>) -> Running {
    let metrics = Arc::new(Metrics::default());
    let (writer, spool) = Writer::open(config, store.clone(), metrics).await.unwrap();
    let cancel = CancellationToken::new();
    let task = tokio::spawn(writer.run(cancel.clone()));
    Running {
        spool,
        cancel,
        task,
    }
}

impl Running {
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

async fn entries(dir: &Path) -> Vec<Entry> {
    Reader::open(dir)
        .await
        .unwrap()
        .after(0, 1_000_000)
        .await
        .unwrap()
}

fn events(entries: &[Entry]) -> Vec<Event> {
    entries
        .iter()
        .map(|entry| Record::decode(&entry.body).unwrap().event)
        .collect()
}

async fn report(dir: &Path, trust: &Trust) -> Report {
    verify("node-a", &entries(dir).await, trust, None, now_ms())
}

#[tokio::test]
async fn many_writers_make_one_chain_that_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let (store, trust) = credentials();
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
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
    let report = report(dir.path(), &trust).await;
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
    let dir = tempfile::tempdir().unwrap();
    let (store, trust) = credentials();
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    running.spool.record(opened("ends")).await.unwrap();
    running.spool.record(opened("lost")).await.unwrap();
    running.spool.record_end(closed("ends")).await.unwrap();
    // Dropped where it stands, as a kill leaves it: no checkpoint, no farewell.
    running.task.abort();
    let _ = running.task.await;

    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    running.stop().await;
    let entries = entries(dir.path()).await;
    let events = events(&entries);
    assert!(matches!(events[0], Event::Restart { .. }));
    assert!(matches!(events[4], Event::Restart { .. }), "{events:?}");
    assert_eq!(
        events[5],
        Event::Lost {
            connection: "lost".into()
        }
    );
    let report = report(dir.path(), &trust).await;
    assert!(report.holds(), "{:?}", report.problems);
    assert_eq!((report.restarts, report.lost), (2, 1));
}

#[tokio::test]
async fn a_full_disk_denies_and_the_gap_is_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let (store, trust) = credentials();
    let small = SpoolConfig {
        max_bytes: 200_000,
        ..SpoolConfig::new(dir.path(), "node-a")
    };
    let running = start(small, &store).await;
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

    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    running.spool.drop_one();
    running.spool.record(opened("again")).await.unwrap();
    running.stop().await;
    let report = report(dir.path(), &trust).await;
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
    let dir = tempfile::tempdir().unwrap();
    let (store, trust) = credentials();
    let small = SpoolConfig {
        max_bytes: 400_000,
        ..SpoolConfig::new(dir.path(), "node-a")
    };
    let running = start(small, &store).await;
    let mut refused = 0;
    for n in 0..2000 {
        if running.spool.record(denied(&format!("d-{n}"))).await == Err(NotRecorded::Full) {
            refused += 1;
        }
    }
    assert!(refused > 0, "the spool grew beyond its bound");
    running.spool.record(opened("c")).await.unwrap();
    running.stop().await;
    let report = report(dir.path(), &trust).await;
    assert!(report.holds(), "{:?}", report.problems);
    assert_eq!(report.noted_gaps, refused);
}

#[tokio::test]
async fn much_that_is_dropped_is_told_of_once_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = credentials();
    let seldom = SpoolConfig {
        checkpoint_interval: Duration::from_secs(3600),
        ..SpoolConfig::new(dir.path(), "node-a")
    };
    let running = start(seldom, &store).await;
    for n in 0..50 {
        running.spool.drop_one();
        running
            .spool
            .record(opened(&format!("c-{n}")))
            .await
            .unwrap();
    }
    running.stop().await;
    let events = events(&entries(dir.path()).await);
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
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = credentials();
    let small = SpoolConfig {
        max_bytes: 100_000,
        ..SpoolConfig::new(dir.path(), "node-a")
    };
    let running = start(small.clone(), &store).await;
    running.spool.record(opened("lost")).await.unwrap();
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
    running.task.abort();
    let _ = running.task.await;
    let before = entries(dir.path()).await;

    let running = start(small, &store).await;
    let refused = running.spool.record(opened("again")).await;
    assert!(refused.is_err(), "{refused:?}");
    running.spool.acknowledged(before.last().unwrap().sequence);
    running.spool.record(opened("again")).await.unwrap();
    running.stop().await;
    let events = events(&entries(dir.path()).await[1..]);
    assert!(matches!(events[0], Event::Restart { .. }), "{events:?}");
    assert!(
        matches!(&events[1], Event::Lost { connection } if connection == "lost"),
        "{events:?}"
    );
    assert!(matches!(&events[2], Event::Opened(it) if it.connection == "again"));
}

#[tokio::test]
async fn what_was_acknowledged_is_known_to_the_next_gate() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = credentials();
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    assert_eq!(running.spool.unacknowledged(), 1, "the restart");
    for n in 0..5 {
        let denied = denied(&format!("d-{n}"));
        running.spool.record(denied).await.unwrap();
    }
    running.spool.acknowledged(4);
    assert_eq!(running.spool.unacknowledged(), 2);
    running.stop().await;

    // The checkpoint of the stop and the second restart have come to it.
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    assert_eq!(running.spool.unacknowledged(), 4);
    running.stop().await;
    // As an older gate has left it, and its central record has let it forget the first.
    sql(dir.path(), "DELETE FROM meta WHERE name = 'acknowledged'").await;
    sql(dir.path(), "DELETE FROM entries WHERE sequence < 4").await;
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    assert_eq!(running.spool.unacknowledged(), 7);
    running.stop().await;
}

async fn sql(dir: &Path, text: &'static str) {
    use sqlx::Connection;
    let url = format!("sqlite:{}", dir.join("record.sqlite").display());
    let mut connection = sqlx::SqliteConnection::connect(&url).await.unwrap();
    sqlx::query(text).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

#[tokio::test]
async fn a_changed_file_is_found_and_a_broken_end_is_not_continued() {
    let dir = tempfile::tempdir().unwrap();
    let (store, trust) = credentials();
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    for n in 0..5 {
        running
            .spool
            .record(opened(&format!("c-{n}")))
            .await
            .unwrap();
    }
    running.stop().await;
    sql(
        dir.path(),
        "UPDATE entries SET body = CAST(replace(CAST(body AS TEXT), '203.0.113.10', '203.0.113.11') AS BLOB) \
         WHERE sequence = 3",
    )
    .await;
    assert!(!report(dir.path(), &trust).await.holds());
    sql(
        dir.path(),
        "UPDATE entries SET hash = randomblob(32) WHERE sequence = (SELECT max(sequence) FROM entries)",
    )
    .await;
    let config = SpoolConfig::new(dir.path(), "node-a");
    let result = Writer::open(config, store.clone(), Arc::default()).await;
    assert!(
        matches!(result, Err(StoreError::Broken { .. })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_spool_has_one_gate_of_one_node() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = credentials();
    let running = start(SpoolConfig::new(dir.path(), "node-a"), &store).await;
    let again = Writer::open(
        SpoolConfig::new(dir.path(), "node-a"),
        store.clone(),
        Arc::default(),
    );
    assert!(matches!(again.await, Err(StoreError::InUse(_))));
    running.stop().await;
    let other = Writer::open(
        SpoolConfig::new(dir.path(), "node-b"),
        store.clone(),
        Arc::default(),
    );
    assert!(matches!(other.await, Err(StoreError::OtherNode { .. })));
}

#[tokio::test]
async fn entries_wait_unsealed_for_the_first_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let empty = CredentialStore::empty();
    let quick = SpoolConfig {
        checkpoint_interval: Duration::from_millis(1),
        ..SpoolConfig::new(dir.path(), "node-a")
    };
    let running = start(quick.clone(), &empty).await;
    running.spool.record(opened("early")).await.unwrap();
    running.stop().await;
    let (store, trust) = credentials();
    assert_eq!(report(dir.path(), &trust).await.sealed, 0);
    let running = start(quick, &store).await;
    running.stop().await;
    let report = report(dir.path(), &trust).await;
    assert!(report.holds() && report.sealed >= 3, "{report:?}");
}
