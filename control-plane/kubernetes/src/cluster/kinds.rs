//! One kind: listed, watched, and listed again when the watch has a gap.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use futures_util::{Stream, StreamExt, stream::BoxStream};
use kube::{
    Api, Client,
    core::{DynamicObject, PartialObjectMeta},
    runtime::watcher::{self, watcher},
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use turnpike_api::Kind;

use super::{Message, holdings::Holdings, store::Stores, trouble::Trouble};
use crate::{Event, Impairment};

/// A watch is ended and begun anew where it stood after this many seconds, so that lost rights and
/// connections that died in silence are noticed.
const WATCH_SECONDS: u32 = 30;
/// Objects in one answer: what is held at most in the form in which the server sends it.
const PAGE: u32 = 250;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// After this long without an error the next one is answered with a short pause again.
const CALM: Duration = Duration::from_secs(60);
/// Between looks for a kind that does not exist.
const ABSENT_PAUSE: Duration = Duration::from_secs(3);
/// A watch that was refused and is not refused again for this long stands, though it has nothing
/// to tell.
const STANDS: Duration = Duration::from_secs(10);
/// A server that starts or is busy refuses for a moment; what lasts longer is told.
const PASSING: Duration = Duration::from_secs(5);
/// How long a kind must not exist until what was read of it is believed to be gone too.
const GONE: Duration = Duration::from_secs(30);

type Objects = BoxStream<'static, watcher::Result<watcher::Event<DynamicObject>>>;

pub(super) struct Watched {
    kind: Kind,
    client: Client,
    stores: Stores,
    messages: mpsc::Sender<Message>,
    reachable: watch::Receiver<bool>,
    holdings: Holdings,
    told: Option<Impairment>,
    pauses: ExponentialBackoff,
    last_failure: Option<Instant>,
    absent_since: Option<Instant>,
    failing_since: Option<Instant>,
}

/// Nobody takes events any more.
struct Closed;

impl Watched {
    pub(super) fn new(
        kind: Kind,
        client: Client,
        stores: Stores,
        messages: mpsc::Sender<Message>,
        reachable: watch::Receiver<bool>,
    ) -> Self {
        Self {
            kind,
            client,
            stores,
            messages,
            reachable,
            holdings: Holdings::new(kind),
            told: None,
            pauses: pauses(),
            last_failure: None,
            absent_since: None,
            failing_since: None,
        }
    }

    /// Ends when nobody takes events any more.
    pub(super) async fn run(mut self) {
        let mut objects = self.objects();
        loop {
            let next = match self.told {
                Some(_) => timeout(STANDS, objects.next()).await,
                None => Ok(objects.next().await),
            };
            let taken = match next {
                Ok(Some(Ok(event))) => self.take(event).await,
                Ok(Some(Err(error))) => {
                    let trouble = Trouble::of(&error);
                    tracing::debug!(kind = %self.kind, %error, "a watch failed");
                    if matches!(
                        trouble,
                        Trouble::Absent | Trouble::Garbled | Trouble::Outdated
                    ) {
                        // What comes after it may be another world than what was before.
                        objects = self.objects();
                    }
                    self.failed(&trouble).await
                }
                Ok(None) => {
                    objects = self.objects();
                    Ok(())
                }
                Err(_) if *self.reachable.borrow() => {
                    self.failing_since = None;
                    self.tell(None).await
                }
                Err(_) => Ok(()),
            };
            if taken.is_err() {
                return;
            }
        }
    }

    fn objects(&self) -> Objects {
        let resource = self.kind.resource();
        let client = self.client.clone();
        let config = watcher::Config::default()
            .timeout(WATCH_SECONDS)
            .page_size(PAGE);
        if matches!(self.kind, Kind::Namespace | Kind::ServiceAccount) {
            let api = Api::<PartialObjectMeta<DynamicObject>>::all_with(client, &resource);
            metadata_only(watcher(api, config)).boxed()
        } else {
            watcher(Api::<DynamicObject>::all_with(client, &resource), config).boxed()
        }
    }

    async fn take(&mut self, event: watcher::Event<DynamicObject>) -> Result<(), Closed> {
        match event {
            // Said before the server was asked.
            watcher::Event::Init => {
                self.holdings.begin_list();
                return Ok(());
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                let (judged, events) = self.holdings.take(object);
                self.stores.put(&judged);
                self.send(events).await?;
            }
            watcher::Event::Delete(object) => {
                let (key, events) = self.holdings.remove(&object);
                self.stores.remove(&key);
                self.send(events).await?;
            }
            watcher::Event::InitDone => {
                let events = self.holdings.end_list();
                self.forget(&events);
                self.send(events).await?;
                self.listed().await?;
            }
        }
        self.absent_since = None;
        self.failing_since = None;
        self.pauses = pauses();
        self.tell(None).await
    }

    async fn failed(&mut self, trouble: &Trouble) -> Result<(), Closed> {
        if *trouble == Trouble::Absent {
            let since = *self.absent_since.get_or_insert_with(Instant::now);
            if since.elapsed() > GONE && !self.holdings.is_empty() {
                tracing::warn!(kind = %self.kind, "the kind is gone, and all of it with it");
                let events = self.holdings.clear();
                self.forget(&events);
                self.send(events).await?;
            }
            self.listed().await?;
        }
        let failing_since = *self.failing_since.get_or_insert_with(Instant::now);
        let passing = trouble.may_pass() && failing_since.elapsed() < PASSING;
        if let Some(impairment) = trouble
            .impairment(&self.kind.resource())
            .filter(|_| !passing)
        {
            self.tell(Some(impairment)).await?;
        }
        self.pause(trouble).await;
        Ok(())
    }

    /// Shorter where the server comes back meanwhile.
    async fn pause(&mut self, trouble: &Trouble) {
        let now = Instant::now();
        if self.last_failure.is_some_and(|last| now - last > CALM) {
            self.pauses = pauses();
        }
        self.last_failure = Some(now);
        let pause = match trouble {
            Trouble::Absent => ABSENT_PAUSE.mul_f64(0.75 + 0.5 * fastrand::f64()),
            _ => self.pauses.next().unwrap_or(LONGEST_PAUSE),
        };
        if *self.reachable.borrow_and_update() {
            sleep(pause).await;
            return;
        }
        let is_back = tokio::select! {
            () = sleep(pause) => false,
            back = self.reachable.wait_for(|reachable| *reachable) => back.is_ok(),
        };
        if is_back {
            // All kinds come back at once, and with them those of other clients.
            sleep(FIRST_PAUSE.mul_f64(2.0 * fastrand::f64())).await;
        }
    }

    /// Drops what is gone from the stores too.
    fn forget(&self, events: &[Event]) {
        for event in events {
            match event {
                Event::Deleted(key) => self.stores.remove(key),
                Event::Resolved(rejection) => {
                    if let Some(key) = &rejection.object {
                        self.stores.remove(key);
                    }
                }
                _ => {}
            }
        }
    }

    async fn listed(&self) -> Result<(), Closed> {
        let listed = self.messages.send(Message::Listed(self.kind)).await;
        listed.map_err(|_| Closed)
    }

    /// Says what is wrong with the kind now, if that is something else than before.
    async fn tell(&mut self, found: Option<Impairment>) -> Result<(), Closed> {
        if self.told == found {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.told, found.clone());
        let events = before.map(Event::Restored).into_iter();
        self.send(events.chain(found.map(Event::Impaired))).await
    }

    async fn send(&self, events: impl IntoIterator<Item = Event>) -> Result<(), Closed> {
        for event in events {
            let sent = self.messages.send(Message::Event(event)).await;
            sent.map_err(|_| Closed)?;
        }
        Ok(())
    }
}

fn pauses() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Objects with nothing but their metadata.
fn metadata_only(
    events: impl Stream<Item = watcher::Result<watcher::Event<PartialObjectMeta<DynamicObject>>>>,
) -> impl Stream<Item = watcher::Result<watcher::Event<DynamicObject>>> {
    let whole = |partial: PartialObjectMeta<DynamicObject>| DynamicObject {
        types: None,
        metadata: partial.metadata,
        data: serde_json::Value::Null,
    };
    events.map(move |event| {
        event.map(|event| match event {
            watcher::Event::Apply(object) => watcher::Event::Apply(whole(object)),
            watcher::Event::Delete(object) => watcher::Event::Delete(whole(object)),
            watcher::Event::InitApply(object) => watcher::Event::InitApply(whole(object)),
            watcher::Event::Init => watcher::Event::Init,
            watcher::Event::InitDone => watcher::Event::InitDone,
        })
    })
}
