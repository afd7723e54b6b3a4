//! The composition: from bound sockets and configuration to a running gate, and its end.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    net::{TcpListener, UdpSocket},
    sync::mpsc,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use turnpike_certs::CredentialStore;
use turnpike_ledger::{Event, record::Verdict};
use turnpike_rules::{
    Identity,
    host::HostName,
    pod::{Members, PodEgress},
};
use turnpike_wire::{
    ads::{self, ClientConfig, Subscription},
    ca_client,
    channel::Controller,
    names::WILDCARD,
    resource::Resource,
};

use crate::{
    control::Control,
    dns::{self, DnsConfig, Resolver},
    door::{
        Door, DoorConfig,
        accept::{self, Stops},
    },
    feed,
    listen::Sockets,
    metrics::Metrics,
    pages,
    parts::{PartEnded, Parts},
    spool::{Reader, SpoolConfig, StoreError, Writer, now_ms},
    state::{Answer, Owner, PodLimits, State},
    upload::{self, UploadConfig},
};

/// All that the gate needs to know at its start.
#[derive(Clone, Debug)]
pub struct GateConfig {
    pub node: String,
    pub spool: SpoolConfig,
    pub dns: DnsConfig,
    pub door: DoorConfig,
    /// For the node's pods and their policies to become known at the start. Until then connections
    /// and questions wait in the kernel's queues; after it, who is not known is refused.
    pub start_timeout: Duration,
    /// Connections may go on for this long after SIGTERM.
    pub drain: Duration,
}

/// Where what the gate knows comes from.
#[derive(Clone, Debug)]
pub struct Sources {
    pub cluster: String,
    pub controller: Controller,
    pub identity: Identity,
    pub feed_socket: PathBuf,
    /// None: entries stay in the spool.
    pub audit: Option<UploadConfig>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("a socket cannot be used: {0}")]
    Socket(#[from] io::Error),
}

/// A gate that takes connections. Its parts are owned here: [`Gate::stop`] ends them in order.
#[derive(Debug)]
pub struct Gate {
    pub state: State,
    pub owner: Arc<Owner>,
    pub metrics: Arc<Metrics>,
    pub credentials: Arc<CredentialStore>,
    config: GateConfig,
    parts: Parts,
    spool: crate::spool::Spool,
    connections: TaskTracker,
    stops: Stops,
    /// Sources, DNS, metrics: end when no connection is left.
    services: TaskTracker,
    services_stop: CancellationToken,
    writer: tokio::task::JoinHandle<()>,
    writer_stop: CancellationToken,
}

impl Gate {
    /// Opens the spool and serves on `sockets`, as soon as [`Gate::owner`] has been told the node's
    /// pods and their policies, by [`Gate::follow`] or by the caller, or after
    /// [`GateConfig::start_timeout`].
    pub async fn start(
        config: GateConfig,
        limits: PodLimits,
        credentials: Arc<CredentialStore>,
        sockets: Sockets,
    ) -> Result<Self, StartError> {
        sockets.set_nonblocking()?;
        let metrics = Arc::new(Metrics::default());
        let (owner, state) = Owner::new(limits);
        let (writer, spool) =
            Writer::open(config.spool.clone(), credentials.clone(), metrics.clone()).await?;
        owner.remember(answers_before(&config.spool.dir).await?);
        let writer_stop = CancellationToken::new();
        let parts = Parts::default();
        let writing = writer.run(writer_stop.clone());
        let writer = tokio::spawn(parts.watched("record", writer_stop.clone(), writing));
        let gate = Self {
            state,
            owner,
            metrics,
            credentials,
            config,
            parts,
            spool,
            connections: TaskTracker::new(),
            stops: Stops::default(),
            services: TaskTracker::new(),
            services_stop: CancellationToken::new(),
            writer,
            writer_stop,
        };
        gate.serve(sockets)?;
        Ok(gate)
    }

    fn serve(&self, sockets: Sockets) -> io::Result<()> {
        let Sockets {
            door,
            dns_udp,
            dns_tcp,
            http,
        } = sockets;
        let shared = Arc::new(Door {
            config: self.config.door,
            state: self.state.clone(),
            spool: self.spool.clone(),
            metrics: self.metrics.clone(),
            tasks: self.connections.clone(),
        });
        // A verdict on a pod that is merely not known yet would be a false one, on record.
        let known = self
            .state
            .clone()
            .completed(self.config.start_timeout)
            .shared();
        for listener in door {
            let listener = TcpListener::from_std(listener)?;
            let serving = accept::serve(listener, shared.clone(), self.stops.clone());
            let stop = self.stops.accepting.clone();
            let (known, stopped) = (known.clone(), stop.clone());
            let serving = async move {
                stopped.run_until_cancelled(known).await;
                serving.await;
            };
            self.services
                .spawn(self.parts.watched("door", stop, serving));
        }
        let resolver = Arc::new(Resolver::new(
            self.config.dns.clone(),
            self.state.clone(),
            self.spool.clone(),
            self.metrics.clone(),
        ));
        let (tasks, stop) = (self.services.clone(), self.services_stop.clone());
        for socket in dns_udp {
            let socket = UdpSocket::from_std(socket)?;
            let serving =
                dns::server::serve_udp(socket, resolver.clone(), tasks.clone(), stop.clone());
            self.part("DNS over UDP", known.clone().then(|()| serving));
        }
        for listener in dns_tcp {
            let listener = TcpListener::from_std(listener)?;
            let serving =
                dns::server::serve_tcp(listener, resolver.clone(), tasks.clone(), stop.clone());
            self.part("DNS over TCP", known.clone().then(|()| serving));
        }
        let http = TcpListener::from_std(http)?;
        let pages = pages::Pages {
            state: self.state.clone(),
            spool: self.spool.clone(),
            metrics: self.metrics.clone(),
            parts: self.parts.clone(),
        };
        self.part("pages", pages::serve(http, pages));
        Ok(())
    }

    /// Follows controller, CA, agent and central record.
    pub fn follow(&self, sources: Sources) {
        let Sources {
            cluster,
            controller,
            identity,
            feed_socket,
            audit,
        } = sources;
        let control = Control::restore(
            &self.config.spool.dir,
            self.owner.clone(),
            self.metrics.clone(),
        );
        let (subscriptions, receiver) = mpsc::channel(2);
        for type_url in [PodEgress::TYPE_URL, Members::TYPE_URL] {
            let all = Subscription::subscribe(type_url, [WILDCARD]);
            subscriptions
                .try_send(all)
                .expect("the channel was made with room for both");
        }
        let ads_config = ClientConfig::new(self.config.node.clone(), cluster);
        let ads_controller = controller.clone();
        self.part("confirmation", control.clone().confirm());
        self.part("discovery", async move {
            // Dropped, it would end the client.
            let _subscriptions = subscriptions;
            ads::run(ads_config, ads_controller, receiver, control).await;
        });
        let renewal = ca_client::keep_fresh(controller, identity, self.credentials.clone());
        self.part("certificate", renewal);
        let (owner, state, spool) = (self.owner.clone(), self.state.clone(), self.spool.clone());
        self.part("feed", feed::follow(feed_socket, owner, state, spool));
        if let Some(config) = audit {
            let (credentials, spool) = (self.credentials.clone(), self.spool.clone());
            self.part("upload", upload::upload(config, credentials, spool));
        }
    }

    /// Runs what nobody may miss, until the services stop.
    fn part(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.services_stop.clone();
        let watched = self.parts.watched(name, stop.clone(), work);
        self.services.spawn(stop.run_until_cancelled_owned(watched));
    }

    /// Serves until `stop` or until a part ends, and then comes to its end in order.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), PartEnded> {
        let ended = tokio::select! {
            () = stop => Ok(()),
            ended = self.parts.ended() => Err(ended),
        };
        tracing::info!("stopping");
        self.stop().await;
        ended
    }

    /// Takes nothing new, lets connections finish up to the deadline, cuts the rest, and seals the
    /// record.
    pub async fn stop(self) {
        let Self {
            config,
            connections,
            stops,
            services,
            services_stop,
            writer,
            writer_stop,
            ..
        } = self;
        stops.accepting.cancel();
        connections.close();
        if timeout(config.drain, connections.wait()).await.is_err() {
            tracing::info!(
                connections = connections.len(),
                "cutting what has not finished"
            );
            stops.deadline.cancel();
            if timeout(Duration::from_secs(5), connections.wait())
                .await
                .is_err()
            {
                tracing::warn!("connections did not end; they are lost on record");
            }
        }
        services_stop.cancel();
        services.close();
        if timeout(Duration::from_secs(5), services.wait())
            .await
            .is_err()
        {
            tracing::warn!("some tasks did not end in time");
        }
        writer_stop.cancel();
        if let Err(error) = writer.await {
            tracing::error!(%error, "the record's writer failed");
        }
    }
}

/// Entries looked through for answers that still hold.
const LOOK_BACK: u32 = 20_000;

/// What pods were answered before this start and may still use, from the record.
async fn answers_before(dir: &Path) -> Result<HashMap<String, Vec<Answer>>, StoreError> {
    let records = Reader::open(dir).await?.newest(LOOK_BACK).await?;
    let now = now_ms();
    let mut answers: HashMap<String, Vec<Answer>> = HashMap::new();
    // Oldest first, as they were given.
    for record in records.into_iter().rev() {
        let Event::Dns(lookup) = record.event else {
            continue;
        };
        let given = Duration::from_secs(lookup.ttl_seconds);
        let ago = Duration::from_millis(u64::try_from(now - record.time_ms).unwrap_or(0));
        let (Some(left), Ok(name)) = (given.checked_sub(ago), HostName::parse(&lookup.name)) else {
            continue;
        };
        if lookup.verdict == Verdict::Denied || lookup.pod.uid.is_empty() {
            continue;
        }
        let (chain, addresses) = (lookup.answer_chain, lookup.addresses);
        answers.entry(lookup.pod.uid).or_default().push(Answer {
            name,
            chain,
            addresses,
            left,
        });
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use turnpike_certs::{Authority, KeyRequest, LEAF_LIFETIME, TrustBundle};

    use super::*;

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.0\r\nhost: gate\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn gate(dir: &Path) -> (Gate, std::net::SocketAddr) {
        gate_with(dir, CredentialStore::empty()).await
    }

    async fn gate_with(
        dir: &Path,
        credentials: Arc<CredentialStore>,
    ) -> (Gate, std::net::SocketAddr) {
        let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let http = listen();
        let address = http.local_addr().unwrap();
        let sockets = Sockets {
            door: vec![listen()],
            dns_udp: vec![std::net::UdpSocket::bind("127.0.0.1:0").unwrap()],
            dns_tcp: vec![listen()],
            http,
        };
        let config = GateConfig {
            node: "node-a".into(),
            spool: SpoolConfig {
                checkpoint_interval: Duration::from_secs(3600),
                ..SpoolConfig::new(dir, "node-a")
            },
            dns: DnsConfig {
                upstream: "127.0.0.1:1".parse().unwrap(),
                cluster: "127.0.0.1:1".parse().unwrap(),
                cluster_domain: HostName::parse("cluster.local").unwrap(),
                search_domains: vec![],
            },
            door: DoorConfig::default(),
            start_timeout: Duration::from_secs(3600),
            drain: Duration::from_secs(1),
        };
        let gate = Gate::start(config, PodLimits::default(), credentials, sockets);
        (gate.await.unwrap(), address)
    }

    #[tokio::test]
    async fn a_part_that_ends_is_not_well_and_ends_the_gate() {
        let dir = tempfile::tempdir().unwrap();
        let (gate, address) = gate(dir.path()).await;
        assert!(
            get(address, "/healthz/live")
                .await
                .starts_with("HTTP/1.0 200")
        );
        gate.part("feed", async { panic!("as if there were a fault in it") });
        let ended = gate.parts.ended().await;
        assert_eq!(ended, PartEnded("feed"));
        let answer = get(address, "/healthz/live").await;
        assert!(
            answer.starts_with("HTTP/1.0 503") && answer.contains("`feed`"),
            "{answer}"
        );
        let end = timeout(Duration::from_secs(20), gate.run(std::future::pending()));
        assert_eq!(end.await.unwrap(), Err(ended));
    }

    #[tokio::test]
    async fn no_part_is_missed_when_the_gate_is_told_to_stop() {
        let dir = tempfile::tempdir().unwrap();
        let (gate, _) = gate(dir.path()).await;
        let parts = gate.parts.clone();
        assert_eq!(gate.run(std::future::ready(())).await, Ok(()));
        assert_eq!(parts.missing(), None);
    }

    fn identity(account: &str) -> Identity {
        Identity::new("cluster.local", "turnpike-system", account).unwrap()
    }

    fn credentials() -> Arc<CredentialStore> {
        let (own, now) = (identity("turnpike-gate"), SystemTime::now());
        let authority = Authority::generate("cluster.local", 10 * LEAF_LIFETIME, now).unwrap();
        let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
        let request = KeyRequest::new(&own).unwrap();
        let issued = authority.sign(request.csr_pem(), &own, LEAF_LIFETIME, now);
        let credentials = request.into_credentials(&issued.unwrap().chain, roots);
        CredentialStore::new(credentials.unwrap())
    }

    #[tokio::test]
    async fn what_this_node_alone_has_is_shown_while_the_record_cannot_be_reached() {
        let dir = tempfile::tempdir().unwrap();
        let (gate, address) = gate_with(dir.path(), credentials()).await;
        let nobody = "127.0.0.1:1";
        gate.follow(Sources {
            cluster: "cluster".into(),
            controller: Controller {
                address: nobody.into(),
                server_name: "controller".into(),
                root_file: "/none".into(),
                token_file: "/none".into(),
            },
            identity: identity("turnpike-gate"),
            feed_socket: "/none".into(),
            audit: Some(UploadConfig {
                address: nobody.into(),
                identity: identity("turnpike-audit"),
                node: "node-a".into(),
                spool_dir: dir.path().into(),
            }),
        });
        for connection in ["c-1", "c-2", "c-3"] {
            let connection = connection.into();
            gate.spool.record(Event::Lost { connection }).await.unwrap();
        }
        let page = get(address, "/metrics").await;
        // And the restart.
        let shown = "\nturnpike_gate_unacknowledged_entries 4\n";
        assert!(page.contains(shown), "{page}");
    }

    /// As an abort from outside, or a panic in it.
    #[tokio::test]
    async fn without_the_writer_of_its_record_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (gate, _) = gate(dir.path()).await;
        gate.writer.abort();
        let end = timeout(Duration::from_secs(20), gate.run(std::future::pending()));
        assert_eq!(end.await.unwrap(), Err(PartEnded("record")));
    }
}
