//! What the gate is told: every pod of the node with its addresses, and what the kernel denied.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};
use turnpike_datapath::{Denials, Denied};
use turnpike_ipam::Attachment;
use turnpike_wire::node::{
    self, FeedEvent, LocalPod, RemovedPod, Synced, WatchRequest, feed_event::Event,
};

use crate::node::Node;

/// Events that a reader may be behind. One that is further behind loses its stream and begins
/// anew with all pods, so it misses denials at most.
const BEHIND: usize = 4096;
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// The pods as the gate should know them, and the stream of changes.
#[derive(Debug)]
pub struct Feed {
    pods: Mutex<BTreeMap<Attachment, LocalPod>>,
    events: broadcast::Sender<Event>,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            pods: Mutex::default(),
            events: broadcast::channel(BEHIND).0,
        }
    }
}

impl Feed {
    /// A new pod, or a change of one.
    pub fn added(&self, attachment: &Attachment, pod: LocalPod) {
        let mut pods = self.pods.lock();
        if pods.insert(attachment.clone(), pod.clone()).as_ref() != Some(&pod) {
            // Nobody listens: the next reader begins with all pods.
            self.events.send(Event::Added(pod)).ok();
        }
    }

    pub fn removed(&self, attachment: &Attachment) {
        let mut pods = self.pods.lock();
        if let Some(LocalPod {
            container_id,
            addresses,
            ..
        }) = pods.remove(attachment)
        {
            self.events
                .send(Event::Removed(RemovedPod {
                    container_id,
                    addresses,
                }))
                .ok();
        }
    }

    pub fn denied(&self, denied: Denied) {
        self.events.send(Event::Denied(wire(denied))).ok();
    }

    /// All pods, and every change after them: none between is missed, none is told twice.
    fn watch(&self) -> (Vec<LocalPod>, broadcast::Receiver<Event>) {
        let pods = self.pods.lock();
        (pods.values().cloned().collect(), self.events.subscribe())
    }
}

fn wire(denied: Denied) -> node::Denied {
    let Denied {
        time,
        source,
        destination,
        protocol,
        source_port,
        destination_port,
        interface,
        count,
    } = denied;
    let octets = |address: std::net::IpAddr| match address {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    node::Denied {
        time_ms: i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        source: octets(source),
        destination: octets(destination),
        protocol: u32::from(protocol),
        source_port: u32::from(source_port),
        destination_port: u32::from(destination_port),
        interface,
        count,
    }
}

/// The gRPC service.
#[derive(Clone, Debug)]
pub struct FeedService(pub Arc<Node>);

type Events = Pin<Box<dyn Stream<Item = Result<FeedEvent, Status>> + Send>>;

#[tonic::async_trait]
impl node::feed_server::Feed for FeedService {
    type WatchStream = Events;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Events>, Status> {
        let (pods, changes) = self.0.feed.watch();
        let first = pods
            .into_iter()
            .map(Event::Added)
            .chain([Event::Synced(Synced {})]);
        let later = BroadcastStream::new(changes).map(|event| {
            event.map_err(|_| Status::data_loss("the reader was too slow: watch again"))
        });
        let events = stream::iter(first.map(Ok))
            .chain(later)
            .map(|event| event.map(|event| FeedEvent { event: Some(event) }))
            .take_until(self.0.stop.clone().cancelled_owned());
        Ok(Response::new(Box::pin(events)))
    }
}

/// Carries the kernel's denials to the feed, until the node stops.
pub async fn forward_denials(node: Arc<Node>) {
    while !node.stop.is_cancelled() {
        match Denials::open() {
            Ok(mut denials) => forward(&node, &mut denials).await,
            Err(error) => tracing::error!(%error, "denials cannot be read from the kernel"),
        }
        let pause = tokio::time::sleep(REOPEN_PAUSE);
        node.stop.run_until_cancelled(pause).await;
    }
}

async fn forward(node: &Node, denials: &mut Denials) {
    while let Some(next) = node.stop.run_until_cancelled(denials.next()).await {
        match next {
            Ok(denied) => {
                node.metrics.denied_packets.inc_by(denied.count);
                node.feed.denied(denied);
            }
            Err(error) => {
                tracing::error!(%error, "the kernel's denials are interrupted");
                return;
            }
        }
    }
}
