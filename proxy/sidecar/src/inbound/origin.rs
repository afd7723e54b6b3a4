//! Which workload a caller is of, for metrics. The control side is asked about its address, and no
//! request waits for the answer: reports do.

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;
use turnpike_rules::{Identity, workload::Names};

use crate::{
    mesh::Lookup,
    observe::{Flags, HttpOutcome, HttpSeries, Labels, Observer, TcpSeries},
    worker::Worker,
};

/// Reports of one connection that wait for the answer; further ones are counted without it.
const WAITING: usize = 256;

/// What is known of a caller's workload. By default: nothing, and nobody is asked.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin(Option<Arc<Asked>>);

#[derive(Debug, Default)]
struct Asked {
    /// Set once, when nothing is added to `waiting` any more.
    answer: OnceLock<Option<Arc<Names>>>,
    waiting: Mutex<Vec<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    report: Report,
    observer: Arc<dyn Observer>,
    labels: Arc<Labels>,
}

#[derive(Clone, Copy, Debug)]
enum Report {
    Finished(HttpOutcome),
    Opened,
    Transferred(u64, u64),
    Closed(Flags),
}

impl Origin {
    /// Asks who is at the address that a caller of this identity has.
    pub(super) fn ask(worker: &Worker, address: IpAddr, identity: &Identity) -> Self {
        let mut lookup = worker.shared.mesh.lookup(address);
        let identity = identity.clone();
        // Whoever has the address now need not be who called: the certificate decides.
        let names = move |lookup| match lookup {
            Lookup::Workload(workload) if workload.identity.as_ref() == Some(&identity) => {
                workload.names.clone()
            }
            _ => None,
        };
        let asked = Arc::new(Asked::default());
        // One that is known is there at the first look.
        match lookup
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            Poll::Ready(known) => asked.answered(names(known)),
            Poll::Pending => {
                // Ends with the deadline of lookups; the worker's runtime has it until then.
                let asked = asked.clone();
                tokio::spawn(async move { asked.answered(names(lookup.await)) });
            }
        }
        Self(Some(asked))
    }

    pub(super) fn http(&self, observer: &Arc<dyn Observer>, labels: Labels) -> Arc<dyn HttpSeries> {
        match &self.0 {
            None => observer.http(&labels),
            Some(asked) => match asked.answer.get() {
                Some(names) => observer.http(&named(&labels, names.as_ref())),
                None => Arc::new(Series::<dyn HttpSeries>::new(asked, observer, labels)),
            },
        }
    }

    pub(super) fn tcp(&self, observer: &Arc<dyn Observer>, labels: Labels) -> Arc<dyn TcpSeries> {
        match &self.0 {
            None => observer.tcp(&labels),
            Some(asked) => match asked.answer.get() {
                Some(names) => observer.tcp(&named(&labels, names.as_ref())),
                None => Arc::new(Series::<dyn TcpSeries>::new(asked, observer, labels)),
            },
        }
    }
}

impl Asked {
    fn answered(&self, names: Option<Arc<Names>>) {
        let waiting = {
            let mut waiting = self.waiting.lock();
            let _ = self.answer.set(names.clone());
            std::mem::take(&mut *waiting)
        };
        for each in waiting {
            let labels = named(&each.labels, names.as_ref());
            match each.report {
                Report::Finished(outcome) => each.observer.http(&labels).finished(&outcome),
                Report::Opened => each.observer.tcp(&labels).opened(),
                Report::Transferred(received, sent) => {
                    each.observer.tcp(&labels).transferred(received, sent);
                }
                Report::Closed(flags) => each.observer.tcp(&labels).closed(flags),
            }
        }
    }
}

/// A series that is known when the answer is.
#[derive(Debug)]
struct Series<S: ?Sized> {
    asked: Arc<Asked>,
    observer: Arc<dyn Observer>,
    labels: Arc<Labels>,
    known: OnceLock<Arc<S>>,
}

impl<S: ?Sized> Series<S> {
    fn new(asked: &Arc<Asked>, observer: &Arc<dyn Observer>, labels: Labels) -> Self {
        Self {
            asked: asked.clone(),
            observer: observer.clone(),
            labels: labels.into(),
            known: OnceLock::new(),
        }
    }

    /// Tells the series, or has the report wait.
    fn tell(
        &self,
        report: Report,
        series: fn(&dyn Observer, &Labels) -> Arc<S>,
        tell: impl Fn(&S),
    ) {
        if let Some(known) = self.known.get() {
            return tell(known);
        }
        if self.asked.answer.get().is_none() {
            let mut waiting = self.asked.waiting.lock();
            // Looked at again: an answer takes the lock before it is given.
            if self.asked.answer.get().is_none() {
                if waiting.len() < WAITING {
                    waiting.push(Waiting {
                        report,
                        observer: self.observer.clone(),
                        labels: self.labels.clone(),
                    });
                    return;
                }
                drop(waiting);
                return tell(&series(&*self.observer, &self.labels));
            }
        }
        let names = self.asked.answer.get().and_then(Option::as_ref);
        let known = self
            .known
            .get_or_init(|| series(&*self.observer, &named(&self.labels, names)));
        tell(known);
    }
}

fn named(labels: &Labels, names: Option<&Arc<Names>>) -> Labels {
    Labels {
        names: names.cloned(),
        ..labels.clone()
    }
}

impl HttpSeries for Series<dyn HttpSeries> {
    fn finished(&self, outcome: &HttpOutcome) {
        let series = |observer: &dyn Observer, labels: &Labels| observer.http(labels);
        self.tell(Report::Finished(*outcome), series, |known| {
            known.finished(outcome);
        });
    }
}

fn tcp_series(observer: &dyn Observer, labels: &Labels) -> Arc<dyn TcpSeries> {
    observer.tcp(labels)
}

impl TcpSeries for Series<dyn TcpSeries> {
    fn opened(&self) {
        self.tell(Report::Opened, tcp_series, |known| known.opened());
    }

    fn transferred(&self, received: u64, sent: u64) {
        self.tell(Report::Transferred(received, sent), tcp_series, |known| {
            known.transferred(received, sent);
        });
    }

    fn closed(&self, flags: Flags) {
        self.tell(Report::Closed(flags), tcp_series, |known| {
            known.closed(flags)
        });
    }
}
