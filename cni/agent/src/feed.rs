//! What the gate is told: every pod of the node with its addresses, and what the kernel denied.
//!
//! What was refused and a reader did not take before its stream ended is kept for the next one, or
//! counted. What was on its way to a gate that was killed is lost: the protocol has no acknowledgement.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::UNIX_EPOCH,
};

use futures_util::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tonic::{Request, Response, Status};
use turnpike_datapath::{Cause, Denied, PodKey};
use turnpike_ipam::Attachment;
use turnpike_wire::node::{
    self, FeedEvent, Lapse, LocalPod, RemovedPod, Synced, WatchRequest, feed_event::Event,
};

use crate::node::Node;

/// Events that a reader may be behind. The stream of one that is further behind ends with them: it
/// begins anew with all pods, and with the denials that were kept meanwhile.
const BEHIND: usize = 4096;

/// Denials kept for a reader while there is none; beyond it they are counted.
const KEPT: usize = 4096;
/// Host sides of veths whose pods are gone, kept to know whose last packets are told late.
const DEPARTED: usize = 1024;

/// The pods as the gate should know them, and the streams of changes. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    known: Arc<Mutex<Known>>,
    passed_on: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Known {
    pods: BTreeMap<Attachment, LocalPod>,
    /// Container by the host side of its veth, of pods that are gone, too.
    interfaces: HashMap<String, String>,
    /// Interfaces in the order in which their pods went.
    departed: VecDeque<String>,
    readers: Vec<Reader>,
    /// Events so far.
    count: u64,
    /// What nobody was there to hear.
    kept: VecDeque<Event>,
    /// Packets told of to nobody and not kept.
    lost: u64,
}

/// One that is told of every event, none left out.
#[derive(Debug)]
struct Reader {
    /// The first event that it was told of.
    since: u64,
    queue: mpsc::Sender<(u64, Event)>,
}

impl Feed {
    /// A new pod, or a change of one.
    pub fn added(&self, attachment: &Attachment, pod: LocalPod) {
        let mut known = self.known.lock();
        known
            .interfaces
            .insert(interface(&pod), pod.container_id.clone());
        if known.pods.insert(attachment.clone(), pod.clone()).as_ref() != Some(&pod) {
            known.tell(Event::Added(pod));
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
        known.tell(Event::Removed(RemovedPod {
            container_id,
            addresses,
        }));
    }

    /// A refused packet, on behalf of the pod whose veth it came in on.
    pub fn denied(&self, denied: Denied) {
        let mut known = self.known.lock();
        let container = match denied.cause {
            Cause::Uninvited => None,
            Cause::Refused | Cause::Spoofed => known.interfaces.get(&denied.interface).cloned(),
        };
        let event = Event::Denied(wire(denied, container.unwrap_or_default()));
        known.tell(event);
    }

    /// Something that should have been told, and cannot be any more.
    pub fn lapse(&self, reason: impl Into<String>, packets: u64) {
        let reason = reason.into();
        let event = Event::Lapse(Lapse { reason, packets });
        self.known.lock().tell(event);
    }

    /// Refused packets that no reader has been told of yet.
    pub fn untold(&self) -> u64 {
        let known = self.known.lock();
        let kept: u64 = known.kept.iter().map(packets).sum();
        kept.saturating_add(known.lost)
    }

    /// Returns when a reader was given what was kept, or gave it back.
    pub async fn passed_on(&self) {
        self.passed_on.notified().await;
    }

    /// All pods, what was kept, and every change after them: none between is missed.
    fn watch(&self) -> Changes {
        let mut known = self.known.lock();
        let pods = known.pods.values().cloned().map(Event::Added);
        let mut first: VecDeque<_> = pods.chain([Event::Synced(Synced {})]).collect();
        first.extend(std::mem::take(&mut known.kept));
        let packets = std::mem::take(&mut known.lost);
        if packets > 0 {
            let reason =
                "refused packets that the gate was not there to take, beyond what was kept";
            let reason = reason.to_owned();
            first.push_back(Event::Lapse(Lapse { reason, packets }));
        }
        let (queue, later) = mpsc::channel(BEHIND);
        let since = known.count;
        known.readers.push(Reader { since, queue });
        self.passed_on.notify_one();
        Changes {
            first,
            later,
            feed: self.clone(),
        }
    }
}

/// What a reader takes. It ends when the reader is too far behind; what is in it when it is dropped is
/// kept for the next reader.
#[derive(Debug)]
struct Changes {
    first: VecDeque<Event>,
    later: mpsc::Receiver<(u64, Event)>,
    feed: Feed,
}

impl Stream for Changes {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if let Some(event) = self.first.pop_front() {
            return Poll::Ready(Some(event));
        }
        let next = ready!(self.later.poll_recv(cx));
        Poll::Ready(next.map(|(_, event)| event))
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        let feed = self.feed.clone();
        let mut known = feed.known.lock();
        // Under the lock: nothing is told to it any more.
        self.later.close();
        known.readers.retain(|reader| !reader.queue.is_closed());
        let mut untold: VecDeque<_> = std::mem::take(&mut self.first);
        while let Ok((number, event)) = self.later.try_recv() {
            if !known.readers.iter().any(|reader| reader.since <= number) {
                untold.push_back(event);
            }
        }
        let newer = std::mem::take(&mut known.kept);
        untold
            .into_iter()
            .chain(newer)
            .for_each(|event| known.keep(event));
        feed.passed_on.notify_one();
    }
}

impl Known {
    fn tell(&mut self, event: Event) {
        let number = self.count;
        self.count += 1;
        self.readers
            .retain(|reader| reader.queue.try_send((number, event.clone())).is_ok());
        if self.readers.is_empty() {
            self.keep(event);
        }
    }

    /// For the next reader, which begins with all pods.
    fn keep(&mut self, event: Event) {
        match event {
            Event::Added(_) | Event::Removed(_) | Event::Synced(_) => {}
            _ if self.kept.len() < KEPT => self.kept.push_back(event),
            _ => self.lost = self.lost.saturating_add(packets(&event).max(1)),
        }
    }

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

/// Refused packets that the event tells of.
fn packets(event: &Event) -> u64 {
    match event {
        Event::Added(_) | Event::Removed(_) | Event::Synced(_) => 0,
        Event::Denied(denied) => denied.count,
        Event::Lapse(lapse) => lapse.packets,
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
        let behind = Status::data_loss("the reader was too slow: watch again");
        let events = self
            .0
            .feed
            .watch()
            .map(|event| Ok(FeedEvent { event: Some(event) }))
            .chain(stream::iter([Err(behind)]))
            .take_until(self.0.stop.clone().cancelled_owned());
        Ok(Response::new(Box::pin(events)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use futures_util::FutureExt;

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

    /// What the reader is told at once.
    fn told(changes: &mut Changes) -> Vec<Event> {
        std::iter::from_fn(|| changes.next().now_or_never().flatten()).collect()
    }

    fn containers(events: &[Event]) -> Vec<&str> {
        let containers = events.iter().filter_map(|event| match event {
            Event::Denied(denied) => Some(denied.container_id.as_str()),
            _ => None,
        });
        containers.collect()
    }

    /// Packets that the events tell of, by denials and by lapses.
    fn told_packets(events: &[Event]) -> (u64, u64) {
        let (lapses, others): (Vec<_>, Vec<_>) =
            events.iter().partition(|it| matches!(it, Event::Lapse(_)));
        let sum = |events: Vec<&Event>| events.into_iter().map(packets).sum();
        (sum(others), sum(lapses))
    }

    #[test]
    fn what_nobody_hears_is_kept_and_beyond_it_counted() {
        let feed = Feed::default();
        feed.added(&attachment(), pod());
        for _ in 0..KEPT + 10 {
            feed.denied(denied(Cause::Refused));
        }
        assert_eq!(feed.untold(), 3 * KEPT as u64 + 30);
        let mut reader = feed.watch();
        assert_eq!(feed.untold(), 0);
        let events = told(&mut reader);
        assert!(matches!(&events[..2], [Event::Added(_), Event::Synced(_)]));
        assert_eq!(told_packets(&events), (3 * KEPT as u64, 30));
        drop(reader);
        assert_eq!(told_packets(&told(&mut feed.watch())), (0, 0), "told once");
    }

    #[test]
    fn a_reader_that_is_too_slow_is_told_of_nothing_less_by_its_next_stream() {
        let feed = Feed::default();
        let mut slow = feed.watch();
        for _ in 0..BEHIND + KEPT + 10 {
            feed.denied(denied(Cause::Refused));
        }
        feed.lapse("also", 5);
        let before = told(&mut slow);
        assert_eq!(told_packets(&before), (3 * BEHIND as u64, 0));
        let ended = slow.next().now_or_never();
        assert!(matches!(ended, Some(None)), "it is to watch again");
        drop(slow);
        let after = told(&mut feed.watch());
        assert_eq!(told_packets(&after), (3 * KEPT as u64, 35));
    }

    #[test]
    fn what_a_reader_leaves_behind_is_told_to_the_next_unless_another_heard_it() {
        let feed = Feed::default();
        feed.denied(denied(Cause::Refused));
        let mut gone = feed.watch();
        assert!(matches!(
            gone.next().now_or_never(),
            Some(Some(Event::Synced(_)))
        ));
        feed.added(&attachment(), pod());
        feed.denied(denied(Cause::Refused));
        feed.lapse("a reason", 7);
        drop(gone);
        feed.denied(denied(Cause::Spoofed));
        let mut reader = feed.watch();
        let events = told(&mut reader);
        assert!(matches!(
            &events[..],
            [
                Event::Added(_),
                Event::Synced(_),
                Event::Denied(_),
                Event::Denied(_),
                Event::Lapse(_),
                Event::Denied(_),
            ]
        ));

        // A gate that takes over from another.
        let old = feed.watch();
        feed.denied(denied(Cause::Refused));
        drop(old);
        assert_eq!(told_packets(&told(&mut reader)), (3, 0));
        drop(reader);
        assert_eq!(
            told_packets(&told(&mut feed.watch())),
            (0, 0),
            "it was heard"
        );
    }

    #[test]
    fn a_packet_is_its_veths_pods_also_after_its_end_and_never_a_strangers() {
        let feed = Feed::default();
        feed.added(&attachment(), pod());
        feed.denied(denied(Cause::Spoofed));
        feed.removed(&attachment());
        feed.denied(denied(Cause::Refused));
        feed.denied(denied(Cause::Uninvited));
        assert_eq!(containers(&told(&mut feed.watch())), ["c1", "c1", ""]);
        let next = LocalPod {
            container_id: "c2".into(),
            ..pod()
        };
        feed.added(&attachment(), next);
        feed.denied(denied(Cause::Refused));
        assert_eq!(containers(&told(&mut feed.watch())), ["c2"]);
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
