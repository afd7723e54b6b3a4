//! What has moved of a request and its response, and since when nothing has.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

/// One request's bytes both ways. The worker's sweep looks at it, so that an idle timeout costs no
/// timer of its own.
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
    waker: RefCell<Option<Waker>>,
}

impl Progress {
    pub(crate) fn limit(&self, idle: Option<Duration>) {
        let ms = |idle: Duration| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX).max(1);
        self.idle.set(idle.map_or(0, ms));
    }

    pub(crate) fn look(&self, now_ms: u64) {
        let moved = self.received.get() + self.sent.get();
        match self.seen.get() {
            Some((before, since)) if before == moved => {
                let idle = self.idle.get();
                if idle != 0 && now_ms.saturating_sub(since) > idle {
                    self.is_idle.set(true);
                    if let Some(waker) = self.waker.take() {
                        waker.wake();
                    }
                }
            }
            _ => self.seen.set(Some((moved, now_ms))),
        }
    }

    /// Ready when nothing has moved for too long.
    pub(crate) fn poll_idle(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_idle.get() {
            return Poll::Ready(());
        }
        if self.idle.get() != 0 {
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
        assert!(progress.poll_idle(cx).is_pending());
        progress.sent.set(1);
        under_way.look(1150);
        under_way.look(1250);
        assert!(progress.poll_idle(cx).is_pending());
        under_way.look(1251);
        assert!(progress.poll_idle(cx).is_ready());
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
                .poll_idle(&Context::from_waker(Waker::noop()))
                .is_pending()
        );
    }
}
