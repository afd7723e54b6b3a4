//! The agent's feed: which pod has which address, and what the node's rules refused.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::sleep};
use tonic::transport::{Channel, Endpoint};
use turnpike_ledger::{
    Event,
    record::{Attempt, Protocol, Verdict},
};
use turnpike_wire::{
    backoff::Backoff,
    node::{
        Denied, FeedEvent, Lapse, LocalPod, WatchRequest, denied::Cause, feed_client::FeedClient,
        feed_event,
    },
};

use crate::{
    describe::bounded,
    spool::Spool,
    state::{Change, Owner, PodInfo, Standing, State},
};

/// The longest pause before the next attempt. The agent is on this host and may add a pod as soon as
/// it is back: what the pod asks before the gate has heard of it is refused.
const RETRY_MAX: Duration = Duration::from_millis(300);

#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("cannot connect: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("{0}")]
    Status(#[from] tonic::Status),
    #[error("the agent ended the feed")]
    Ended,
}

/// Follows the feed for as long as it is polled. While the agent is away, what is known stays.
pub async fn follow(socket: PathBuf, owner: Arc<Owner>, state: State, spool: Spool) {
    let mut backoff = Backoff::new(Duration::from_millis(100), RETRY_MAX);
    let mut told = String::new();
    loop {
        let mut received = false;
        let Err(error) = watch(&socket, &owner, &state, &spool, &mut received).await;
        let why = error.to_string();
        if received {
            backoff.reset();
        }
        // Not at every attempt.
        if received || why != told {
            tracing::warn!(error = why, socket = %socket.display(), "the agent's feed is away");
            told = why;
        }
        sleep(backoff.next_pause()).await;
    }
}

async fn watch(
    socket: &std::path::Path,
    owner: &Owner,
    state: &State,
    spool: &Spool,
    received: &mut bool,
) -> Result<std::convert::Infallible, FeedError> {
    let mut client = FeedClient::new(connect(socket.to_owned()).await?);
    let mut events = client.watch(WatchRequest {}).await?.into_inner();
    owner.apply(Change::FeedStarted);
    while let Some(event) = events.next().await {
        *received = true;
        apply(event?, owner, state, spool);
    }
    Err(FeedError::Ended)
}

async fn connect(path: PathBuf) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is for the protocol's sake; the connector knows where to go.
    Endpoint::from_static("http://agent")
        .connect_with_connector(connector)
        .await
}

fn apply(event: FeedEvent, owner: &Owner, state: &State, spool: &Spool) {
    match event.event {
        Some(feed_event::Event::Added(pod)) => {
            if let Some(info) = pod_info(pod) {
                owner.apply(Change::PodAdded(info));
            }
        }
        Some(feed_event::Event::Removed(pod)) => {
            let addresses = addresses(&pod.addresses).unwrap_or_default();
            owner.apply(Change::PodRemoved {
                container_id: pod.container_id,
                addresses,
            });
        }
        Some(feed_event::Event::Synced(_)) => owner.apply(Change::FeedSynced),
        Some(feed_event::Event::Denied(denied)) => record(denied, state, spool),
        Some(feed_event::Event::Lapse(Lapse { reason, packets })) => {
            spool.note(Event::Gap {
                entries: packets.max(1),
                reason: bounded(&reason),
            });
        }
        // From a later agent.
        None => {}
    }
}

fn pod_info(pod: LocalPod) -> Option<PodInfo> {
    let LocalPod {
        uid,
        namespace,
        name,
        container_id,
        addresses: raw,
        selected,
        ..
    } = pod;
    let Some(addresses) = addresses(&raw) else {
        tracing::error!(
            namespace,
            name,
            "the feed gives a pod an address of no family: left out"
        );
        return None;
    };
    Some(PodInfo {
        uid,
        namespace,
        name,
        container_id,
        addresses,
        selected,
    })
}

/// A packet that the node's rules refused, put on record for the pod that sent it.
fn record(denied: Denied, state: &State, spool: &Spool) {
    let (Some(source), Some(destination)) = (address(&denied.source), address(&denied.destination))
    else {
        return spool.drop_one();
    };
    let standing = match denied.cause() {
        Cause::Uninvited => Standing::Unknown,
        Cause::Refused | Cause::Spoofed => state.view().sender(&denied.container_id, source),
    };
    if !spool.may_record_denial(standing.pod().map(|pod| &**pod), Instant::now()) {
        return;
    }
    let port = |port: u32| u16::try_from(port).unwrap_or(0);
    spool.note(Event::Denied(Attempt {
        connection: String::new(),
        pod: standing.recorded(),
        source: SocketAddr::new(source, port(denied.source_port)),
        destination: SocketAddr::new(destination, port(denied.destination_port)),
        protocol: match denied.protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            1 | 58 => Protocol::Icmp,
            _ => Protocol::Other,
        },
        verdict: Verdict::Denied,
        reason: Some(why(&denied)),
        rule: None,
        name: None,
        answer_chain: vec![],
        claimed: None,
        request: None,
        assurance: None,
        count: denied.count.max(1),
    }));
}

fn why(denied: &Denied) -> String {
    let Denied {
        protocol,
        interface,
        ethertype,
        ..
    } = denied;
    let frame = match ethertype {
        0 | 0x0800 | 0x86dd => format!("IP protocol {protocol}"),
        0x0806 => "ARP".to_owned(),
        other => format!("no IP: EtherType {other:#06x}"),
    };
    match denied.cause() {
        Cause::Refused => format!("refused by the node's rules at {interface} ({frame})"),
        Cause::Spoofed => format!(
            "not a frame that the pod may send: its sender, options or protocol are not the pod's; \
             dropped at {interface} ({frame})"
        ),
        Cause::Uninvited => {
            format!("uninvited, from outside the cluster; dropped at {interface} ({frame})")
        }
    }
}

/// None where one of them is no address.
fn addresses(raw: &[Vec<u8>]) -> Option<Vec<IpAddr>> {
    raw.iter().map(|bytes| address(bytes)).collect()
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes)
            .ok()
            .map(|b| IpAddr::from(b).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::{net::UnixListener, time::timeout};
    use tokio_util::sync::CancellationToken;
    use turnpike_certs::CredentialStore;
    use turnpike_ledger::Record;

    use super::*;
    use crate::{
        spool::{Reader, SpoolConfig, Writer},
        state::PodLimits,
    };

    #[tokio::test]
    async fn an_agent_that_is_back_is_asked_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let config = SpoolConfig::new(dir.path(), "node-a");
        let (_writer, spool) = Writer::open(config, CredentialStore::empty(), Arc::default())
            .await
            .unwrap();
        let (owner, state) = Owner::new(PodLimits::default());
        let socket = dir.path().join("feed.sock");
        tokio::time::pause();
        tokio::spawn(follow(socket.clone(), owner, state, spool));
        sleep(Duration::from_secs(600)).await;
        let agent = UnixListener::bind(&socket).unwrap();
        let asked = timeout(RETRY_MAX + Duration::from_millis(50), agent.accept()).await;
        asked.expect("it pauses for longer").unwrap();
    }

    fn denied(source: Vec<u8>) -> FeedEvent {
        let event = feed_event::Event::Denied(Denied {
            time_ms: 0,
            source,
            destination: vec![203, 0, 113, 99],
            protocol: 17,
            source_port: 5555,
            destination_port: 443,
            interface: "eniaaa".into(),
            count: 3,
            ..Denied::default()
        });
        FeedEvent { event: Some(event) }
    }

    #[tokio::test]
    async fn refused_packets_are_recorded_for_the_pod_that_sent_them() {
        let dir = tempfile::tempdir().unwrap();
        let config = SpoolConfig::new(dir.path(), "node-a");
        let (writer, spool) = Writer::open(config, CredentialStore::empty(), Arc::default())
            .await
            .unwrap();
        let (owner, state) = Owner::new(PodLimits::default());
        let pod = LocalPod {
            uid: "u1".into(),
            namespace: "shop".into(),
            name: "pay-0".into(),
            container_id: "c1".into(),
            addresses: vec![vec![10, 0, 1, 5]],
            selected: true,
            ..LocalPod::default()
        };
        let added = FeedEvent {
            event: Some(feed_event::Event::Added(pod.clone())),
        };
        apply(added, &owner, &state, &spool);
        let broken = LocalPod {
            addresses: vec![vec![1, 2, 3]],
            ..pod
        };
        let broken = FeedEvent {
            event: Some(feed_event::Event::Added(broken)),
        };
        apply(broken, &owner, &state, &spool);
        for source in [vec![10, 0, 1, 5], vec![10, 0, 1, 9], vec![1]] {
            apply(denied(source), &owner, &state, &spool);
        }
        let told = |cause: Cause, container_id: &str, source: Vec<u8>| {
            let mut event = denied(source);
            if let Some(feed_event::Event::Denied(denied)) = &mut event.event {
                denied.container_id = container_id.into();
                denied.set_cause(cause);
            }
            apply(event, &owner, &state, &spool);
        };
        let lie = vec![0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5];
        told(Cause::Spoofed, "c1", lie);
        told(Cause::Uninvited, "", vec![10, 0, 1, 5]);
        let lapse = feed_event::Event::Lapse(Lapse {
            reason: "rules were flushed".into(),
            packets: 0,
        });
        let lapse = FeedEvent { event: Some(lapse) };
        apply(lapse, &owner, &state, &spool);
        let cancel = CancellationToken::new();
        cancel.cancel();
        writer.run(cancel).await;

        let entries = Reader::open(dir.path())
            .await
            .unwrap()
            .after(0, 100)
            .await
            .unwrap();
        let events: Vec<_> = entries
            .iter()
            .map(|entry| Record::decode(&entry.body).unwrap().event)
            .collect();
        let Event::Denied(first) = &events[1] else {
            panic!("{events:?}")
        };
        assert_eq!(first.pod.as_ref().unwrap().name, "pay-0");
        assert_eq!((first.protocol, first.count), (Protocol::Udp, 3));
        let Event::Denied(stranger) = &events[2] else {
            panic!("{events:?}")
        };
        assert_eq!(stranger.pod, None);
        let [Event::Denied(spoofed), Event::Denied(uninvited)] = &events[3..5] else {
            panic!("{events:?}")
        };
        assert_eq!(spoofed.pod.as_ref().unwrap().name, "pay-0", "by its veth");
        assert_eq!(uninvited.pod, None, "in the pod's name, by somebody else");
        let gaps = events.iter().filter_map(|event| match event {
            Event::Gap { entries, reason } => Some((*entries, reason.contains("flushed"))),
            _ => None,
        });
        assert_eq!(gaps.collect::<Vec<_>>(), [(1, true), (1, false)]);
    }
}
