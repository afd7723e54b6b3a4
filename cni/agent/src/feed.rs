//! What the gate is told: every pod of the node with its addresses, and what the kernel denied.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs, io,
    path::Path,
    pin::Pin,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};
use tonic::{Request, Response, Status};
use turnpike_datapath::{Cause, Denials, Denied, PodKey};
use turnpike_ipam::Attachment;
use turnpike_wire::node::{
    self, FeedEvent, Lapse, LocalPod, RemovedPod, Synced, WatchRequest, feed_event::Event,
};

use crate::node::Node;

/// Events that a reader may be behind. One that is further behind loses its stream and begins
/// anew with all pods, so it misses denials at most, and is told how many.
const BEHIND: usize = 4096;
const REOPEN_PAUSE: Duration = Duration::from_secs(1);
/// The rules' count of refused packets as it was when it was last looked at.
const REFUSED: &str = "refused";
const UNTOLD_PAUSE: Duration = Duration::from_secs(2);

/// Denials kept for a reader while there is none; beyond it they are counted.
const KEPT: usize = 4096;
/// Host sides of veths whose pods are gone, kept to know whose last packets are told late.
const DEPARTED: usize = 1024;

/// The pods as the gate should know them, and the stream of changes.
#[derive(Debug)]
pub struct Feed {
    known: Mutex<Known>,
    events: broadcast::Sender<Event>,
}

#[derive(Debug, Default)]
struct Known {
    pods: BTreeMap<Attachment, LocalPod>,
    /// Container by the host side of its veth, of pods that are gone, too.
    interfaces: HashMap<String, String>,
    /// Interfaces in the order in which their pods went.
    departed: VecDeque<String>,
    /// What nobody was there to hear.
    kept: VecDeque<Event>,
    /// Packets told of to nobody and not kept.
    lost: u64,
}

impl Default for Feed {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            events: broadcast::channel(BEHIND).0,
        }
    }
}

impl Feed {
    /// A new pod, or a change of one.
    pub fn added(&self, attachment: &Attachment, pod: LocalPod) {
        let mut known = self.known.lock();
        known
            .interfaces
            .insert(interface(&pod), pod.container_id.clone());
        if known.pods.insert(attachment.clone(), pod.clone()).as_ref() != Some(&pod) {
            // Nobody listens: the next reader begins with all pods.
            self.events.send(Event::Added(pod)).ok();
        }
    }

    pub fn removed(&self, attachment: &Attachment) {
        let mut known = self.known.lock();
        let Some(pod) = known.pods.remove(attachment) else {
            return;
        };
        known.depart(&pod);
        let LocalPod {
            container_id,
            addresses,
            ..
        } = pod;
        self.events
            .send(Event::Removed(RemovedPod {
                container_id,
                addresses,
            }))
            .ok();
    }

    /// A refused packet, on behalf of the pod whose veth it came in on.
    pub fn denied(&self, denied: Denied) {
        let count = denied.count;
        let mut known = self.known.lock();
        let container = match denied.cause {
            Cause::Uninvited => None,
            Cause::Refused | Cause::Spoofed => known.interfaces.get(&denied.interface).cloned(),
        };
        let event = Event::Denied(wire(denied, container.unwrap_or_default()));
        self.tell(&mut known, event, count);
    }

    /// Something that should have been told, and cannot be any more.
    pub fn lapse(&self, reason: impl Into<String>, packets: u64) {
        let reason = reason.into();
        let event = Event::Lapse(Lapse { reason, packets });
        self.tell(&mut self.known.lock(), event, packets.max(1));
    }

    fn tell(&self, known: &mut Known, event: Event, packets: u64) {
        match self.events.send(event) {
            Ok(_) => {}
            Err(unheard) if known.kept.len() < KEPT => known.kept.push_back(unheard.0),
            Err(_) => known.lost = known.lost.saturating_add(packets),
        }
    }

    /// All pods, what was kept, and every change after them: none between is missed, none is told
    /// twice.
    fn watch(&self) -> (Vec<LocalPod>, Vec<Event>, broadcast::Receiver<Event>) {
        let mut known = self.known.lock();
        let mut kept: Vec<_> = known.kept.drain(..).collect();
        let packets = std::mem::take(&mut known.lost);
        if packets > 0 {
            let reason = "refused packets that came while the gate was away, beyond what was kept";
            let reason = reason.to_owned();
            kept.push(Event::Lapse(Lapse { reason, packets }));
        }
        let pods = known.pods.values().cloned().collect();
        (pods, kept, self.events.subscribe())
    }
}

impl Known {
    fn depart(&mut self, pod: &LocalPod) {
        let interface = interface(pod);
        if self.interfaces.get(&interface) != Some(&pod.container_id) {
            return;
        }
        self.departed.push_back(interface);
        if self.departed.len() <= DEPARTED {
            return;
        }
        let Some(oldest) = self.departed.pop_front() else {
            return;
        };
        let holder = self.interfaces.get(&oldest);
        let lives = self
            .pods
            .values()
            .any(|pod| Some(&pod.container_id) == holder);
        if !lives && !self.departed.contains(&oldest) {
            self.interfaces.remove(&oldest);
        }
    }
}

fn interface(pod: &LocalPod) -> String {
    let key = PodKey {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
    };
    key.host_interface()
}

fn wire(denied: Denied, container_id: String) -> node::Denied {
    let Denied {
        time,
        cause,
        ethertype,
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
        container_id,
        cause: match cause {
            Cause::Refused => node::denied::Cause::Refused,
            Cause::Spoofed => node::denied::Cause::Spoofed,
            Cause::Uninvited => node::denied::Cause::Uninvited,
        }
        .into(),
        ethertype: u32::from(ethertype),
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
        let (pods, kept, changes) = self.0.feed.watch();
        let first = pods
            .into_iter()
            .map(Event::Added)
            .chain([Event::Synced(Synced {})])
            .chain(kept);
        let node = Arc::clone(&self.0);
        let later = BroadcastStream::new(changes).map(move |event| {
            event.map_err(|BroadcastStreamRecvError::Lagged(missed)| {
                let reason = "events that the gate was too slow to take";
                node.feed.lapse(reason, missed);
                Status::data_loss("the reader was too slow: watch again")
            })
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

/// Tells how many refused packets were not logged, by the rules' rate or because no agent was there,
/// until the node stops. Looks only after some were logged: before that, no rate was exceeded.
pub async fn tell_untold(node: Arc<Node>) {
    let path = node.settings.state_dir.join(REFUSED);
    let mut before = node.datapath.refusals().await.unwrap_or_default();
    let known = fs::read_to_string(&path)
        .ok()
        .and_then(|text| text.parse().ok());
    let away = known.map_or(0, |known| more(known, before.all));
    if away > 0 {
        let reason = "refused packets while the agent was away, at most";
        node.feed.lapse(reason, away);
    }
    let seen = || node.stop.run_until_cancelled(node.denials_seen.notified());
    loop {
        if let Err(error) = keep(&path, before.all) {
            tracing::warn!(%error, "the count of refused packets was not kept");
        }
        if seen().await.is_none() {
            return;
        }
        let pause = tokio::time::sleep(UNTOLD_PAUSE);
        node.stop.run_until_cancelled(pause).await;
        match node.datapath.refusals().await {
            Ok(now) => {
                let untold = more(before.untold, now.untold);
                if untold > 0 {
                    let reason = "refused packets beyond what is logged of one pod in a second";
                    node.feed.lapse(reason, untold);
                }
                before = now;
            }
            Err(error) => tracing::warn!(%error, "the counters of refused packets cannot be read"),
        }
    }
}

/// A counter that is less than before was made anew.
fn more(before: u64, now: u64) -> u64 {
    now.checked_sub(before).unwrap_or(now)
}

fn keep(path: &Path, refused: u64) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, refused.to_string())?;
    fs::rename(&new, path)
}

async fn forward(node: &Node, denials: &mut Denials) {
    while let Some(next) = node.stop.run_until_cancelled(denials.next()).await {
        match next {
            Ok(denied) => {
                node.metrics.denied_packets.inc_by(denied.count);
                node.feed.denied(denied);
                let overruns = denials.overruns();
                if overruns > 0 {
                    let reason = "refused packets that came faster than they were read";
                    node.feed.lapse(reason, overruns);
                }
                node.denials_seen.notify_one();
            }
            Err(error) => {
                tracing::error!(%error, "the kernel's denials are interrupted");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn attachment() -> Attachment {
        Attachment {
            container_id: "c1".into(),
            ifname: "eth0".into(),
        }
    }

    fn pod() -> LocalPod {
        LocalPod {
            namespace: "shop".into(),
            name: "cart-0".into(),
            container_id: "c1".into(),
            ..LocalPod::default()
        }
    }

    fn denied(cause: Cause) -> Denied {
        Denied {
            time: SystemTime::now(),
            cause,
            ethertype: 0x0800,
            source: [10, 0, 1, 5].into(),
            destination: [203, 0, 113, 66].into(),
            protocol: 17,
            source_port: 1,
            destination_port: 2,
            interface: interface(&pod()),
            count: 3,
        }
    }

    fn containers(events: &[Event]) -> Vec<&str> {
        let containers = events.iter().filter_map(|event| match event {
            Event::Denied(denied) => Some(denied.container_id.as_str()),
            _ => None,
        });
        containers.collect()
    }

    #[test]
    fn what_nobody_hears_is_kept_and_beyond_it_counted() {
        let feed = Feed::default();
        feed.added(&attachment(), pod());
        for _ in 0..KEPT + 10 {
            feed.denied(denied(Cause::Refused));
        }
        let (_, kept, _receiver) = feed.watch();
        assert_eq!(kept.len(), KEPT + 1);
        assert!(
            matches!(&kept[KEPT], Event::Lapse(Lapse { packets: 30, .. })),
            "{:?}",
            kept[KEPT]
        );
        assert!(feed.watch().1.is_empty(), "told once");
    }

    #[test]
    fn a_packet_is_its_veths_pods_also_after_its_end_and_never_a_strangers() {
        let feed = Feed::default();
        feed.added(&attachment(), pod());
        feed.denied(denied(Cause::Spoofed));
        feed.removed(&attachment());
        feed.denied(denied(Cause::Refused));
        feed.denied(denied(Cause::Uninvited));
        assert_eq!(containers(&feed.watch().1), ["c1", "c1", ""]);
        let next = LocalPod {
            container_id: "c2".into(),
            ..pod()
        };
        feed.added(&attachment(), next);
        feed.denied(denied(Cause::Refused));
        assert_eq!(containers(&feed.watch().1), ["c2"]);
    }

    #[test]
    fn interfaces_of_pods_that_are_gone_do_not_gather() {
        let feed = Feed::default();
        for n in 0..3 * DEPARTED {
            let name = format!("job-{n}");
            feed.added(&attachment(), LocalPod { name, ..pod() });
            feed.removed(&attachment());
        }
        let known = feed.known.lock();
        assert!(
            known.interfaces.len() <= DEPARTED,
            "{}",
            known.interfaces.len()
        );
    }
}
