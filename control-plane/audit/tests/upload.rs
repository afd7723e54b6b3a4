//! A gate's spool and the central record over real mTLS and real SQLite.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use turnpike_audit::{
    Query, Store,
    app::{self, Listeners},
};
use turnpike_certs::{
    Authority, CredentialStore, KeyRequest, LEAF_LIFETIME, TrustBundle, client_config,
};
use turnpike_daemon::tasks::Tasks;
use turnpike_gate::{
    metrics::Metrics,
    spool::{Spool, SpoolConfig, Writer, now_ms},
    upload::{UploadConfig, upload},
};
use turnpike_ledger::{
    Chain, Event, Problem, Record, Trust,
    record::{Lookup, Pod, Verdict},
};
use turnpike_rules::Identity;
use turnpike_wire::{
    audit::{self, UploadRequest, audit_client::AuditClient},
    channel::connect,
    names::ALPN_GRPC,
};

struct World {
    authority: Authority,
    roots: TrustBundle,
}

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "turnpike-system", account).unwrap()
}

impl World {
    fn new() -> Self {
        let now = SystemTime::now();
        let authority = Authority::generate("cluster.local", 10 * LEAF_LIFETIME, now).unwrap();
        let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
        Self { authority, roots }
    }

    fn credentials(&self, identity: &Identity) -> Arc<CredentialStore> {
        let request = KeyRequest::new(identity).unwrap();
        let now = SystemTime::now();
        let issued = self
            .authority
            .sign(request.csr_pem(), identity, LEAF_LIFETIME, now)
            .unwrap();
        CredentialStore::new(
            request
                .into_credentials(&issued.chain, self.roots.clone())
                .unwrap(),
        )
    }

    fn trust(&self) -> Trust {
        Trust {
            roots: self.roots.clone(),
            signer: identity("turnpike-gate"),
        }
    }
}

struct Server {
    uploads: SocketAddr,
    questions: SocketAddr,
    health: SocketAddr,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(world: &World, dir: &Path, address: Option<SocketAddr>) -> (Self, Store) {
        let credentials = world.credentials(&identity("turnpike-audit"));
        Self::start_with(credentials, dir, address).await
    }

    async fn start_with(
        credentials: Arc<CredentialStore>,
        dir: &Path,
        address: Option<SocketAddr>,
    ) -> (Self, Store) {
        let store = Store::open(&url(dir)).await.unwrap();
        // Of this process alone: one that comes back to its port must find it free.
        let [.., high, low] = std::process::id().to_be_bytes();
        let any = SocketAddr::from(([127, 9, high, low], 0));
        let uploads = TcpListener::bind(address.unwrap_or(any)).await.unwrap();
        let questions = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let health = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cancel = CancellationToken::new();
        let [up, q, h] = [&uploads, &questions, &health].map(|it| it.local_addr().unwrap());
        let running = app::run(
            store.clone(),
            credentials,
            identity("turnpike-gate"),
            Listeners {
                uploads,
                questions,
                health: Some(health),
            },
            Tasks::default(),
            cancel.clone().cancelled_owned(),
        );
        let task = tokio::spawn(async move { running.await.unwrap() });
        (
            Self {
                uploads: up,
                questions: q,
                health: h,
                cancel,
                task,
            },
            store,
        )
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
    }
}

fn url(dir: &Path) -> String {
    format!("sqlite:{}", dir.join("audit.sqlite").display())
}

fn lookup(n: u32, verdict: Verdict) -> Event {
    Event::Dns(Lookup {
        pod: Pod {
            uid: "u".into(),
            namespace: "shop".into(),
            name: "pay-0".into(),
            identity: None,
        },
        name: format!("n{n}.example"),
        query_type: "A".into(),
        verdict,
        reason: None,
        rule: None,
        answer_chain: vec![],
        addresses: vec![],
        ttl_seconds: 1,
        count: 1,
    })
}

async fn until<F: AsyncFn() -> bool>(what: &str, done: F) {
    for _ in 0..600 {
        if done().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never: {what}");
}

async fn gate(world: &World, dir: &Path, address: SocketAddr) -> (Spool, Vec<JoinHandle<()>>) {
    let credentials = world.credentials(&identity("turnpike-gate"));
    let metrics = Arc::new(Metrics::default());
    let config = SpoolConfig {
        checkpoint_interval: Duration::from_millis(100),
        ..SpoolConfig::new(dir, "node-a")
    };
    let (writer, spool) = Writer::open(config, credentials.clone(), metrics)
        .await
        .unwrap();
    let config = UploadConfig {
        address: address.to_string(),
        identity: identity("turnpike-audit"),
        node: "node-a".into(),
        spool_dir: dir.to_owned(),
    };
    let tasks = vec![
        tokio::spawn(writer.run(CancellationToken::new())),
        tokio::spawn(upload(config, credentials, spool.clone())),
    ];
    (spool, tasks)
}

async fn get(address: SocketAddr, target: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_chain_arrives_whole_across_restarts_of_the_server() {
    let world = World::new();
    let (spool_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, store) = Server::start(&world, dir.path(), None).await;
    let (spool, tasks) = gate(&world, spool_dir.path(), server.uploads).await;
    for n in 0..700 {
        spool.note(lookup(n, Verdict::Allowed));
    }
    let last = spool.record(lookup(700, Verdict::Denied)).await.unwrap();
    until("the first part arrives", async || {
        store.stand("node-a").await.unwrap().head.sequence >= last
    })
    .await;
    let address = server.uploads;
    server.stop().await;
    let last = spool.record(lookup(701, Verdict::Denied)).await.unwrap();
    let (server, store) = Server::start(&world, dir.path(), Some(address)).await;
    until("the rest arrives", async || {
        store.stand("node-a").await.unwrap().head.sequence > last
    })
    .await;

    let reports = store.verify(&world.trust(), now_ms()).await.unwrap();
    assert!(reports[0].holds(), "{reports:?}");
    assert!(reports[0].sealed >= last, "{reports:?}");
    let denied = Query {
        verdict: Some("denied".into()),
        ..Query::default()
    };
    let found = store.records(&denied).await.unwrap();
    assert_eq!(found.len(), 2);
    assert!(found[0].sequence > found[1].sequence, "newest first");

    let answer = get(server.questions, "/v1/records?pod=pay-0&name=n701.example").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("n701.example"),
        "{answer}"
    );
    assert!(
        get(server.questions, "/v1/records?who=me")
            .await
            .starts_with("HTTP/1.1 400")
    );
    assert!(
        get(server.questions, "/v1/verify")
            .await
            .contains("\"problems\":[]")
    );
    assert!(
        get(server.questions, "/metrics")
            .await
            .contains("turnpike_audit_entries_total")
    );
    for task in tasks {
        task.abort();
    }
    server.stop().await;
}

#[tokio::test]
async fn strangers_learn_whether_it_is_well_and_nothing_of_the_record() {
    let world = World::new();
    let dir = tempfile::tempdir().unwrap();
    let (server, _) = Server::start(&world, dir.path(), None).await;
    for (path, status) in [
        ("/healthz/live", "200"),
        ("/healthz/ready", "200"),
        ("/metrics", "200"),
        ("/v1/records", "404"),
        ("/v1/verify", "404"),
    ] {
        let answer = get(server.health, path).await;
        let expected = format!("HTTP/1.1 {status}");
        assert!(answer.starts_with(&expected), "{path}: {answer}");
    }
    server.stop().await;

    let (server, _) = Server::start_with(CredentialStore::empty(), dir.path(), None).await;
    let answer = get(server.health, "/healthz/ready").await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains("certificate"),
        "{answer}"
    );
    server.stop().await;
}

#[tokio::test]
async fn entries_cut_from_the_central_record_are_missed() {
    let world = World::new();
    let (spool_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (server, store) = Server::start(&world, dir.path(), None).await;
    let (spool, tasks) = gate(&world, spool_dir.path(), server.uploads).await;
    let last = spool.record(lookup(1, Verdict::Denied)).await.unwrap();
    until("a checkpoint arrives", async || {
        let stand = store.stand("node-a").await.unwrap();
        stand
            .checkpoint
            .is_some_and(|checkpoint| checkpoint.sequence >= last)
    })
    .await;
    for task in tasks {
        task.abort();
    }
    server.stop().await;
    let mut connection = {
        use sqlx::Connection;
        sqlx::SqliteConnection::connect(&url(dir.path()))
            .await
            .unwrap()
    };
    sqlx::query("DELETE FROM entries WHERE sequence > 1")
        .execute(&mut connection)
        .await
        .unwrap();
    let report = store
        .verify_node("node-a", &world.trust(), now_ms())
        .await
        .unwrap();
    assert!(
        matches!(report.problems[..], [Problem::Truncated { last: 1, .. }]),
        "{report:?}"
    );
}

/// One upload by `caller` of `entries`; the reply's refusal, or the status that refused it.
async fn send(
    world: &World,
    server: &Server,
    caller: &Identity,
    entries: Vec<audit::Entry>,
) -> String {
    let credentials = world.credentials(caller);
    let tls = client_config(credentials, identity("turnpike-audit"), ALPN_GRPC);
    let channel = connect(&server.uploads.to_string(), "audit.test", tls)
        .await
        .unwrap();
    let requests = vec![UploadRequest {
        node: "node-b".into(),
        entries,
    }];
    match AuditClient::new(channel)
        .upload(tokio_stream::iter(requests))
        .await
    {
        Err(status) => format!("{:?}", status.code()),
        Ok(replies) => match replies.into_inner().message().await {
            Ok(reply) => reply.unwrap().refused,
            Err(status) => format!("{:?}", status.code()),
        },
    }
}

#[tokio::test]
async fn only_gates_upload_and_only_what_follows() {
    let world = World::new();
    let dir = tempfile::tempdir().unwrap();
    let (server, store) = Server::start(&world, dir.path(), None).await;
    let gate = identity("turnpike-gate");
    let mut chain = Chain::begin("node-b");
    let mut made = |n| {
        let event = lookup(n, Verdict::Allowed);
        let record = Record {
            time_ms: now_ms(),
            node: "node-b".into(),
            event,
        };
        let entry = chain.append(record.encode());
        audit::Entry {
            sequence: entry.sequence,
            body: entry.body,
            hash: entry.hash.to_vec(),
        }
    };
    let (one, two, three) = (made(1), made(2), made(3));
    let other = Identity::new("cluster.local", "shop", "web").unwrap();
    assert_eq!(
        send(&world, &server, &other, vec![one.clone()]).await,
        "PermissionDenied"
    );

    assert_eq!(send(&world, &server, &gate, vec![one.clone()]).await, "");
    let gap = send(&world, &server, &gate, vec![three.clone()]).await;
    assert!(gap.contains("missing"), "{gap}");
    let mut changed = two.clone();
    changed.body[20] ^= 1;
    let refused = send(&world, &server, &gate, vec![changed]).await;
    assert!(refused.contains("changed"), "{refused}");
    let mut fork = one.clone();
    fork.hash[0] ^= 1;
    let refused = send(&world, &server, &gate, vec![fork]).await;
    assert!(refused.contains("another"), "{refused}");
    assert_eq!(
        store.stand("node-b").await.unwrap().head.sequence,
        1,
        "nothing of it was kept"
    );
    assert_eq!(
        send(&world, &server, &gate, vec![one, two, three]).await,
        "",
        "a repeat is fine"
    );
    assert_eq!(store.stand("node-b").await.unwrap().head.sequence, 3);
    server.stop().await;
}
