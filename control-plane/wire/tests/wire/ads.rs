//! The ADS client: acknowledging, refusing, resuming, coming back.

use std::time::Duration;

use tokio::{net::TcpStream, sync::mpsc, task::JoinHandle, time::timeout};
use turnpike_rules::{ServiceKey, pod::Members, workload::Destination};
use turnpike_wire::{
    ads::{self, ClientConfig, Handler, Subscription, Update},
    resource::{Resource, pack},
};

use crate::controller::{PATIENCE, TestController, root};

const ADDRESS: &str = Destination::TYPE_URL;

fn destination(name: &str) -> Destination {
    Destination::Service(ServiceKey::new("cluster", "shop", name))
}

enum Event {
    Connection(bool),
    Update(Update),
}

/// Hands on what it is given, and refuses updates that name `poison`.
struct Forward(mpsc::UnboundedSender<Event>);

impl Handler for Forward {
    fn apply(&mut self, update: Update) -> Result<(), String> {
        let poisoned = update.added.iter().any(|added| added.version == "poison");
        self.0.send(Event::Update(update)).unwrap();
        if poisoned {
            Err("it is poison".to_owned())
        } else {
            Ok(())
        }
    }

    fn connection(&mut self, connected: bool) {
        let _ = self.0.send(Event::Connection(connected));
    }
}

struct Client {
    subscriptions: mpsc::Sender<Subscription>,
    events: mpsc::UnboundedReceiver<Event>,
    running: JoinHandle<()>,
}

impl Client {
    fn start(controller: turnpike_wire::channel::Controller) -> Self {
        let (subscriptions, receiver) = mpsc::channel(4);
        let (sender, events) = mpsc::unbounded_channel();
        let mut config = ClientConfig::new("pod-1", "cluster");
        config.reconnect_base = Duration::from_millis(10);
        config.reconnect_max = Duration::from_millis(100);
        let running = tokio::spawn(ads::run(config, controller, receiver, Forward(sender)));
        Self {
            subscriptions,
            events,
            running,
        }
    }

    async fn subscribe(&self, type_url: &'static str, names: &[&str]) {
        let change = Subscription::subscribe(type_url, names.iter().copied());
        self.subscriptions.send(change).await.unwrap();
    }

    async fn event(&mut self) -> Event {
        timeout(PATIENCE, self.events.recv())
            .await
            .expect("no event")
            .unwrap()
    }

    /// The next update, whatever happens to the connection meanwhile.
    async fn update(&mut self) -> Update {
        loop {
            if let Event::Update(update) = self.event().await {
                return update;
            }
        }
    }

    async fn connection(&mut self) -> bool {
        loop {
            if let Event::Connection(connected) = self.event().await {
                return connected;
            }
        }
    }
}

fn names(update: &Update) -> Vec<&str> {
    update
        .added
        .iter()
        .map(|added| added.name.as_str())
        .collect()
}

#[tokio::test]
async fn an_update_is_delivered_and_acknowledged() {
    let server = TestController::start().await;
    server.put("default/10.0.0.1", "1", &destination("web"));
    let mut client = Client::start(server.client());
    client
        .subscribe(ADDRESS, &["default/10.0.0.1", "default/10.0.0.2"])
        .await;

    let update = client.update().await;
    assert_eq!(update.type_url, ADDRESS);
    assert_eq!(names(&update), ["default/10.0.0.1"]);
    assert_eq!(
        update.removed,
        ["default/10.0.0.2"],
        "what does not exist is said"
    );
    let found = Destination::decode(&update.added[0].name, &update.added[0].bytes).unwrap();
    assert_eq!(found, destination("web"));

    let first = server
        .see("first request", |r| r.response_nonce.is_empty())
        .await;
    let node = first.node.unwrap();
    assert_eq!(
        (node.id.as_str(), node.cluster.as_str()),
        ("pod-1", "cluster")
    );
    let ack = server.see("ACK", |r| r.response_nonce == "1").await;
    assert_eq!(ack.error_detail, None);
    assert_eq!(ack.type_url, ADDRESS);

    server.remove::<Destination>("default/10.0.0.1");
    assert_eq!(client.update().await.removed, ["default/10.0.0.1"]);
    server
        .see("second ACK", |r| {
            r.response_nonce == "2" && r.error_detail.is_none()
        })
        .await;
}

#[tokio::test]
async fn a_refused_update_is_not_held() {
    let server = TestController::start().await;
    server.put("default/10.0.0.1", "good", &destination("web"));
    let mut client = Client::start(server.client());
    client.subscribe(ADDRESS, &["default/10.0.0.1"]).await;
    client.update().await;
    server.see("ACK", |r| r.response_nonce == "1").await;

    server.put("default/10.0.0.1", "poison", &destination("bad"));
    client.update().await;
    let nack = server.see("NACK", |r| r.response_nonce == "2").await;
    let detail = nack.error_detail.unwrap();
    assert_eq!((detail.code, detail.message.as_str()), (3, "it is poison"));

    // After a reconnect the old version is still the one held.
    server.forget_seen();
    server.cut();
    let resumed = server
        .see("resume", |r| !r.initial_resource_versions.is_empty())
        .await;
    assert_eq!(
        resumed.initial_resource_versions["default/10.0.0.1"],
        "good"
    );
}

#[tokio::test]
async fn a_resource_of_another_type_is_refused() {
    let server = TestController::start().await;
    let mut wrong = pack("default/10.0.0.1", "1", &destination("web"));
    wrong.resource.as_mut().unwrap().type_url = "type.googleapis.com/other".to_owned();
    server.put_packed(ADDRESS, wrong);
    let client = Client::start(server.client());
    client.subscribe(ADDRESS, &["default/10.0.0.1"]).await;
    let nack = server.see("NACK", |r| r.error_detail.is_some()).await;
    let message = nack.error_detail.unwrap().message;
    assert!(
        message.contains("is a `type.googleapis.com/other` among"),
        "{message}"
    );
}

#[tokio::test]
async fn a_new_stream_resumes_where_the_old_one_was() {
    let server = TestController::start().await;
    for n in 1..=3 {
        server.put(&format!("default/10.0.0.{n}"), "1", &destination("web"));
    }
    let mut client = Client::start(server.client());
    client
        .subscribe(
            ADDRESS,
            &["default/10.0.0.1", "default/10.0.0.2", "default/10.0.0.3"],
        )
        .await;
    assert_eq!(client.update().await.added.len(), 3);
    server.see("ACK", |r| r.response_nonce == "1").await;
    let drop = Subscription::unsubscribe(ADDRESS, ["default/10.0.0.3"]);
    client.subscriptions.send(drop).await.unwrap();
    server
        .see("unsubscription", |r| {
            r.resource_names_unsubscribe == ["default/10.0.0.3"]
        })
        .await;

    for round in 2..6 {
        server.forget_seen();
        server.cut();
        // While it is away, one changes and one is asked for anew.
        server.put("default/10.0.0.2", &round.to_string(), &destination("web"));
        let update = client.update().await;
        assert_eq!(
            names(&update),
            ["default/10.0.0.2"],
            "round {round}: only what has changed"
        );
        assert_eq!(update.added[0].version, round.to_string());
        let resumed = server
            .see("resume", |r| !r.initial_resource_versions.is_empty())
            .await;
        assert_eq!(resumed.initial_resource_versions.len(), 2);
        assert_eq!(resumed.initial_resource_versions["default/10.0.0.1"], "1");
        assert_eq!(
            resumed.resource_names_subscribe,
            ["default/10.0.0.1", "default/10.0.0.2"],
            "and what was dropped is not asked for again"
        );
        assert!(resumed.node.is_some(), "each stream begins with the node");
    }
}

#[tokio::test]
async fn a_wildcard_learns_what_has_gone_while_it_was_away() {
    let server = TestController::start().await;
    let members = |address: u8| Members {
        name: "cluster/node-a".into(),
        addresses: vec![[10, 0, 0, address].into()],
        services: vec![],
    };
    server.put("cluster/node-a", "1", &members(1));
    server.put("cluster/node-b", "1", &members(2));
    let mut client = Client::start(server.client());
    client.subscribe(Members::TYPE_URL, &["*"]).await;
    assert_eq!(
        names(&client.update().await),
        ["cluster/node-a", "cluster/node-b"]
    );
    server.see("ACK", |r| r.response_nonce == "1").await;

    server.hold("cluster/node-b");
    server.remove::<Members>("cluster/node-b");
    server.cut();
    server.streams(2).await;
    server.let_go("cluster/node-b");
    assert_eq!(client.update().await.removed, ["cluster/node-b"]);
    server.put("cluster/node-c", "1", &members(3));
    assert_eq!(names(&client.update().await), ["cluster/node-c"]);
}

#[tokio::test]
async fn the_last_word_on_a_name_counts() {
    let server = TestController::start().await;
    server.put("default/10.0.0.1", "1", &destination("web"));
    server.put("default/10.0.0.2", "1", &destination("web"));
    let mut client = Client::start(server.client());
    // Both before the stream is there: the last word counts.
    client
        .subscribe(ADDRESS, &["default/10.0.0.1", "default/10.0.0.2"])
        .await;
    let drop = Subscription::unsubscribe(ADDRESS, ["default/10.0.0.1"]);
    client.subscriptions.send(drop).await.unwrap();
    client.subscribe(ADDRESS, &["default/10.0.0.3"]).await;
    let mut delivered = Vec::new();
    let mut missing = Vec::new();
    while missing.is_empty() || delivered.is_empty() {
        let update = client.update().await;
        delivered.extend(update.added.iter().map(|added| added.name.clone()));
        missing.extend(update.removed);
    }
    assert_eq!(missing, ["default/10.0.0.3"]);
    server.put("default/10.0.0.1", "2", &destination("web"));
    server.put("default/10.0.0.2", "2", &destination("web"));
    let update = client.update().await;
    assert_eq!(names(&update), ["default/10.0.0.2"]);
}

#[tokio::test]
async fn the_server_may_come_later_and_go_and_come_again() {
    let mut server = TestController::start().await;
    server.kill().await;
    let mut client = Client::start(server.client());
    server.put("default/10.0.0.1", "1", &destination("web"));
    client.subscribe(ADDRESS, &["default/10.0.0.1"]).await;

    // Subscriptions do not block while nobody is there, however many there are.
    for n in 2..40 {
        client
            .subscribe(ADDRESS, &[&format!("default/10.0.0.{n}")])
            .await;
    }
    let again = again(&server);
    server.revive(again).await;
    let mut missing = 0;
    let mut found = 0;
    while missing < 38 || found < 1 {
        let update = client.update().await;
        missing += update.removed.len();
        found += update.added.len();
    }

    server.kill().await;
    assert!(!client.connection().await);
    server.put("default/10.0.0.1", "2", &destination("pay"));
    let again = self::again(&server);
    server.revive(again).await;
    let update = client.update().await;
    assert_eq!(update.added[0].version, "2");
}

/// The same root in a new process.
fn again(server: &TestController) -> turnpike_certs::Authority {
    let authority = &server.authority;
    turnpike_certs::Authority::from_pem(authority.certificate_pem(), &authority.key_pem()).unwrap()
}

#[tokio::test]
async fn token_and_roots_are_read_again_at_each_connection() {
    let mut server = TestController::start().await;
    let (token, roots) = (server.client().token_file, server.client().root_file);
    std::fs::write(&token, "an.old.token").unwrap();
    let mut client = Client::start(server.client());
    client.subscribe(ADDRESS, &["default/10.0.0.1"]).await;
    // Refused for a while.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(server.seen().is_empty());
    std::fs::write(&token, crate::controller::TOKEN).unwrap();
    assert_eq!(client.update().await.removed, ["default/10.0.0.1"]);

    // The controller moves to another root; until the bundle has it, it is a stranger.
    server.kill().await;
    server.forget_seen();
    server.revive(root()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(server.seen().is_empty());
    std::fs::write(&roots, server.authority.certificate_pem()).unwrap();
    server
        .see("the client is back", |r| {
            r.resource_names_subscribe == ["default/10.0.0.1"]
        })
        .await;
}

#[tokio::test]
async fn a_server_of_another_name_is_refused() {
    let server = TestController::start().await;
    let mut elsewhere = server.client();
    elsewhere.server_name = "turnpike-audit.turnpike-system.svc".to_owned();
    let error = elsewhere.connect().await.unwrap_err().to_string();
    assert!(error.contains("not valid for name"), "{error}");
    server.client().connect().await.unwrap();
}

#[tokio::test]
async fn errors_say_what_to_look_at() {
    let server = TestController::start().await;
    let mut client = server.client();
    client.root_file = "/no/such/root.pem".into();
    let error = client.connect().await.unwrap_err().to_string();
    assert!(error.contains("/no/such/root.pem"), "{error}");
    let mut client = server.client();
    std::fs::write(&client.token_file, " \n").unwrap();
    let error = client.bearer().await.unwrap_err().to_string();
    assert!(error.contains("is empty"), "{error}");
    client.address = "127.0.0.1:1".to_owned();
    let error = client.connect().await.unwrap_err().to_string();
    assert!(
        error.contains("127.0.0.1:1") && error.contains("refused"),
        "{error}"
    );
}

#[tokio::test]
async fn the_client_ends_with_the_last_subscriber() {
    let server = TestController::start().await;
    let Client {
        subscriptions,
        events: _events,
        running,
    } = Client::start(server.client());
    let one = Subscription::subscribe(ADDRESS, ["default/10.0.0.1"]);
    subscriptions.send(one.clone()).await.unwrap();
    server.streams(1).await;
    drop(subscriptions);
    timeout(PATIENCE, running).await.expect("must end").unwrap();

    // Also while there is no server.
    let mut server = server;
    server.kill().await;
    let Client {
        subscriptions,
        events: _events,
        running,
    } = Client::start(server.client());
    subscriptions.send(one).await.unwrap();
    drop(subscriptions);
    timeout(PATIENCE, running).await.expect("must end").unwrap();
}

#[tokio::test]
async fn nothing_asked_is_no_connection() {
    let server = TestController::start().await;
    let Client {
        subscriptions,
        events: mut nothing,
        running,
    } = Client::start(server.client());
    drop(subscriptions);
    timeout(PATIENCE, running).await.expect("must end").unwrap();
    assert!(nothing.recv().await.is_none());
}

#[tokio::test]
async fn those_who_begin_handshakes_and_wait_keep_nobody_out() {
    let server = TestController::start().await;
    let address = server.client().address;
    let mut held = Vec::new();
    // More than there are handshakes at once.
    for _ in 0..300 {
        held.push(TcpStream::connect(&address).await.unwrap());
    }
    let client = server.client();
    // Before the time is up for those who hold their places.
    let connected = timeout(Duration::from_secs(4), client.connect()).await;
    connected.expect("they are waited for").unwrap();
}
