//! What has moved of a request and its response, since when nothing has, and whether it still may.

use std::{
    cell::{Cell, RefCell},
    fmt,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use http::{Method, Uri};
use turnpike_rules::{host::HostOrIp, workload::SelfConfig};

/// One request's bytes both ways. The worker's sweep looks at it, so that neither an idle timeout
/// nor a change of policy costs a timer or a watcher of its own.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// From the client.
    pub(crate) received: Cell<u64>,
    /// To the client.
    pub(crate) sent: Cell<u64>,
    /// Milliseconds; 0: however long.
    idle: Cell<u64>,
    /// The sum at the last look at which it had changed, and when that was.
    seen: Cell<Option<(u64, u64)>>,
    is_idle: Cell<bool>,
    /// Inbound: who decides whether it may go on.
    live: RefCell<Option<Live>>,
    /// Of whoever waits for something to move.
    waker: RefCell<Option<Waker>>,
}

/// A request that was let in by a configuration, and who asks again under the next.
pub(crate) struct Live {
    pub(crate) judge: Rc<dyn Judge>,
    pub(crate) judged: Arc<SelfConfig>,
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) host: Option<HostOrIp>,
    /// Once it may not, it never may again.
    pub(crate) withdrawn: bool,
}

/// Decides whether a request may go on.
pub(crate) trait Judge {
    fn config(&self) -> Arc<SelfConfig>;
    fn allows(
        &self,
        config: &SelfConfig,
        method: &Method,
        uri: &Uri,
        host: Option<&HostOrIp>,
    ) -> bool;
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live")
            .field("withdrawn", &self.withdrawn)
            .finish_non_exhaustive()
    }
}

/// Why a request does not go on, though neither side has ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupted {
    Idle,
    Withdrawn,
}

impl Progress {
    pub(crate) fn limit(&self, idle: Option<Duration>) {
        let ms = |idle: Duration| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX).max(1);
        self.idle.set(idle.map_or(0, ms));
    }

    /// Asks again under each configuration from now on.
    pub(crate) fn judged_by(&self, live: Live) {
        self.live.replace(Some(live));
    }

    /// Whether it may go on; to be asked before anything moves. Costs a comparison while the
    /// configuration stays.
    pub(crate) fn still_allowed(&self) -> bool {
        let mut live = self.live.borrow_mut();
        let Some(live) = &mut *live else {
            return true;
        };
        let now = live.judge.config();
        if !Arc::ptr_eq(&now, &live.judged) {
            let Live {
                judge,
                method,
                uri,
                host,
                ..
            } = live;
            live.withdrawn |= !judge.allows(&now, method, uri, host.as_ref());
            live.judged = now;
        }
        !live.withdrawn
    }

    /// Pending for good where it may not go on: whoever waits for the response ends it, and is told.
    pub(crate) fn poll_allowed(&self) -> Poll<()> {
        if self.still_allowed() {
            return Poll::Ready(());
        }
        self.wake();
        Poll::Pending
    }

    fn wake(&self) {
        self.waker.take().into_iter().for_each(Waker::wake);
    }

    pub(crate) fn look(&self, now_ms: u64) {
        let moved = self.received.get() + self.sent.get();
        match self.seen.get() {
            Some((before, since)) if before == moved => {
                let idle = self.idle.get();
                let is_idle = idle != 0 && now_ms.saturating_sub(since) > idle;
                self.is_idle.set(self.is_idle.get() || is_idle);
            }
            _ => self.seen.set(Some((moved, now_ms))),
        }
        if self.is_idle.get() || !self.still_allowed() {
            self.wake();
        }
    }

    /// Ready when nothing has moved for too long, or may any more. For whoever waits.
    pub(crate) fn poll_interrupted(&self, cx: &Context<'_>) -> Poll<Interrupted> {
        if self.is_idle.get() {
            return Poll::Ready(Interrupted::Idle);
        }
        if !self.still_allowed() {
            return Poll::Ready(Interrupted::Withdrawn);
        }
        if self.idle.get() != 0 || self.live.borrow().is_some() {
            let mut waker = self.waker.borrow_mut();
            match &mut *waker {
                Some(waker) => waker.clone_from(cx.waker()),
                None => *waker = Some(cx.waker().clone()),
            }
        }
        Poll::Pending
    }
}

/// The requests under way on one connection.
#[derive(Debug, Default)]
pub(crate) struct UnderWay(RefCell<Vec<Rc<Progress>>>);

impl UnderWay {
    pub(crate) fn begin(&self) -> Rc<Progress> {
        let progress = Rc::<Progress>::default();
        self.0.borrow_mut().push(progress.clone());
        progress
    }

    pub(crate) fn end(&self, ended: &Rc<Progress>) {
        let mut all = self.0.borrow_mut();
        if let Some(index) = all.iter().position(|each| Rc::ptr_eq(each, ended)) {
            all.swap_remove(index);
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.0.borrow().len()
    }

    pub(crate) fn look(&self, now_ms: u64) {
        self.0.borrow().iter().for_each(|each| each.look(now_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_is_when_nothing_moves_for_longer_than_the_limit() {
        let under_way = UnderWay::default();
        let progress = under_way.begin();
        let cx = &Context::from_waker(Waker::noop());
        progress.limit(Some(Duration::from_millis(100)));
        under_way.look(1000);
        under_way.look(1100);
        assert!(progress.poll_interrupted(cx).is_pending());
        progress.sent.set(1);
        under_way.look(1150);
        under_way.look(1250);
        assert!(progress.poll_interrupted(cx).is_pending());
        under_way.look(1251);
        assert!(progress.poll_interrupted(cx).is_ready());
        under_way.end(&progress);
        assert_eq!(under_way.count(), 0);
    }

    #[test]
    fn without_a_limit_nothing_is_idle() {
        let under_way = UnderWay::default();
        let progress = under_way.begin();
        under_way.look(1);
        under_way.look(u64::MAX);
        assert!(
            progress
                .poll_interrupted(&Context::from_waker(Waker::noop()))
                .is_pending()
        );
    }
}
