//! Bodies on their way: requests that may be sent again, responses whose end is reported.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::{
    exchange::{End, Finish},
    headers::strip_internal,
    progress::Progress,
};

pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// A request's body as it is sent upstream.
pub(crate) enum RequestBody {
    Empty,
    Stream {
        body: Incoming,
        progress: Rc<Progress>,
    },
    Replay(Replay),
    /// All of it, once.
    Whole(Bytes),
}

impl RequestBody {
    /// The body, and how to send it again if that can be needed.
    pub(crate) fn new(
        body: Incoming,
        progress: &Rc<Progress>,
        keep: Option<usize>,
    ) -> (Self, Source) {
        if body.is_end_stream() {
            return (Self::Empty, Source::Nothing);
        }
        let Some(limit) = keep else {
            return (
                Self::Stream {
                    body,
                    progress: progress.clone(),
                },
                Source::Once,
            );
        };
        let hint = body.size_hint();
        let kept = Kept {
            body,
            hint,
            chunks: Vec::new(),
            bytes: 0,
            limit: Some(limit),
            trailers: None,
            ended: false,
            generation: 0,
            progress: progress.clone(),
        };
        let kept = Rc::new(RefCell::new(kept));
        (Self::Replay(Replay::new(kept.clone())), Source::Kept(kept))
    }
}

/// Where a body comes from if it is needed once more.
pub(crate) enum Source {
    /// There is none, so any number of times.
    Nothing,
    /// It cannot.
    Once,
    Kept(Rc<RefCell<Kept>>),
}

impl Source {
    /// The body from its beginning; `None` where that is gone. The one given before fails from
    /// now on.
    pub(crate) fn again(&self) -> Option<RequestBody> {
        match self {
            Self::Nothing => Some(RequestBody::Empty),
            Self::Once => None,
            Self::Kept(kept) => {
                {
                    let mut kept = kept.borrow_mut();
                    kept.limit?;
                    kept.generation += 1;
                }
                Some(RequestBody::Replay(Replay::new(kept.clone())))
            }
        }
    }

    /// The whole body for another receiver; `None` where it was not read to its end, or is not
    /// kept.
    pub(crate) fn copy(&self) -> Option<RequestBody> {
        match self {
            Self::Nothing => Some(RequestBody::Empty),
            Self::Once => None,
            Self::Kept(kept) => {
                let kept = kept.borrow();
                let whole = kept.limit.is_some() && (kept.ended || kept.body.is_end_stream());
                whole.then(|| RequestBody::Whole(kept.chunks.concat().into()))
            }
        }
    }

    pub(crate) fn can_repeat(&self) -> bool {
        match self {
            Self::Nothing => true,
            Self::Once => false,
            Self::Kept(kept) => kept.borrow().limit.is_some(),
        }
    }

    /// It will not be needed again: what is kept can go.
    pub(crate) fn release(&self) {
        if let Self::Kept(kept) = self {
            kept.borrow_mut().limit = None;
        }
    }
}

/// A body with what was read of it so far, up to a limit.
pub(crate) struct Kept {
    body: Incoming,
    hint: SizeHint,
    chunks: Vec<Bytes>,
    bytes: usize,
    /// `None`: nothing more is kept, and it cannot be repeated.
    limit: Option<usize>,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// Which [`Replay`] may read.
    generation: u32,
    progress: Rc<Progress>,
}

/// One sending of a [`Kept`] body.
pub(crate) struct Replay {
    kept: Rc<RefCell<Kept>>,
    generation: u32,
    next: usize,
    sent: u64,
    trailers_sent: bool,
}

impl Replay {
    fn new(kept: Rc<RefCell<Kept>>) -> Self {
        let generation = kept.borrow().generation;
        Self {
            kept,
            generation,
            next: 0,
            sent: 0,
            trailers_sent: false,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut kept = self.kept.borrow_mut();
        if kept.generation != self.generation {
            return Poll::Ready(Some(Err("the request is being sent elsewhere".into())));
        }
        ready!(kept.progress.poll_allowed());
        if let Some(chunk) = kept.chunks.get(self.next) {
            let chunk = chunk.clone();
            self.next += 1;
            self.sent += chunk.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if kept.limit.is_none() && !kept.chunks.is_empty() {
            kept.chunks = Vec::new();
            self.next = 0;
        }
        if kept.ended {
            if self.trailers_sent {
                return Poll::Ready(None);
            }
            self.trailers_sent = true;
            return Poll::Ready(
                kept.trailers
                    .clone()
                    .map(|trailers| Ok(Frame::trailers(trailers))),
            );
        }
        let mut frame = match ready!(Pin::new(&mut kept.body).poll_frame(cx)) {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
            None => {
                kept.ended = true;
                self.trailers_sent = true;
                return Poll::Ready(None);
            }
        };
        if let Some(data) = frame.data_ref() {
            self.sent += data.len() as u64;
            self.next += usize::from(kept.keep(data));
            return Poll::Ready(Some(Ok(frame)));
        }
        strip_trailers(&mut frame);
        if let Some(trailers) = frame.trailers_ref() {
            kept.ended = true;
            kept.trailers = kept.limit.is_some().then(|| trailers.clone());
            self.trailers_sent = true;
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

impl Kept {
    /// Whether the chunk was kept; one too many, and nothing is.
    fn keep(&mut self, data: &Bytes) -> bool {
        add(&self.progress.received, data.len());
        let Some(limit) = self.limit else {
            return false;
        };
        self.bytes += data.len();
        if self.bytes > limit {
            // The chunks go when the sending that is under way has passed them, which it has.
            self.limit = None;
            return false;
        }
        self.chunks.push(data.clone());
        true
    }
}

/// Servers that put trailers among the headers must not find there what only a proxy may say.
fn strip_trailers(frame: &mut Frame<Bytes>) {
    if let Some(trailers) = frame.trailers_mut() {
        strip_internal(trailers);
    }
}

fn add(count: &Cell<u64>, bytes: usize) {
    count.set(count.get() + bytes as u64);
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Stream { body, progress } => {
                ready!(progress.poll_allowed());
                let mut frame = ready!(Pin::new(body).poll_frame(cx));
                if let Some(Ok(frame)) = &mut frame {
                    match frame.data_ref() {
                        Some(data) => add(&progress.received, data.len()),
                        None => strip_trailers(frame),
                    }
                }
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Self::Replay(replay) => replay.poll(cx),
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Stream { body, .. } => body.is_end_stream(),
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Replay(replay) => {
                let kept = replay.kept.borrow();
                let passed = replay.next >= kept.chunks.len();
                let nothing_left = kept.ended && (replay.trailers_sent || kept.trailers.is_none());
                kept.generation == replay.generation
                    && passed
                    && (nothing_left || kept.body.is_end_stream() && kept.trailers.is_none())
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Stream { body, .. } => body.size_hint(),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Replay(replay) => match replay.kept.borrow().hint.exact() {
                Some(exact) => SizeHint::with_exact(exact.saturating_sub(replay.sent)),
                None => SizeHint::default(),
            },
        }
    }
}

/// A response's body as it is sent to the client. Its end, however it comes, is reported once.
pub(crate) struct ResponseBody {
    content: Content,
    finish: Option<Box<Finish>>,
}

enum Content {
    Empty,
    Full(Bytes),
    Stream(Incoming),
}

impl ResponseBody {
    pub(crate) fn empty() -> Self {
        Self {
            content: Content::Empty,
            finish: None,
        }
    }

    pub(crate) fn full(bytes: Bytes) -> Self {
        Self {
            content: Content::Full(bytes),
            finish: None,
        }
    }

    pub(crate) fn stream(body: Incoming) -> Self {
        Self {
            content: Content::Stream(body),
            finish: None,
        }
    }

    /// What is to be done when it ends.
    #[must_use]
    pub(crate) fn ending_in(mut self, finish: Box<Finish>) -> Self {
        self.finish = Some(finish);
        self
    }

    fn end(&mut self, end: End) {
        if let Some(finish) = self.finish.take() {
            finish.end(end);
        }
    }

    fn poll_stream(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Content::Stream(body) = &mut self.content else {
            return Poll::Ready(None);
        };
        let polled = Pin::new(&mut *body).poll_frame(cx);
        if let Some(finish) = &mut self.finish
            && let Err((end, why)) = finish.poll_interrupted(cx, polled.is_pending())
        {
            self.end(end);
            return Poll::Ready(Some(Err(why.into())));
        }
        match ready!(polled) {
            Some(Ok(frame)) => {
                if let Some(finish) = &mut self.finish {
                    finish.saw(&frame);
                }
                if body.is_end_stream() {
                    self.end(End::Complete);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.end(End::Upstream);
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                self.end(End::Complete);
                Poll::Ready(None)
            }
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut self.content {
            Content::Stream(_) => self.poll_stream(cx),
            Content::Full(bytes) if !bytes.is_empty() => {
                let frame = Frame::data(std::mem::take(bytes));
                if let Some(finish) = &mut self.finish {
                    finish.saw(&frame);
                }
                self.end(End::Complete);
                Poll::Ready(Some(Ok(frame)))
            }
            Content::Full(_) | Content::Empty => {
                self.end(End::Complete);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Empty => true,
            Content::Full(bytes) => bytes.is_empty(),
            Content::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Empty => SizeHint::with_exact(0),
            Content::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Stream(body) => body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if self.finish.is_some() {
            let end = if self.is_end_stream() {
                End::Complete
            } else {
                End::Client
            };
            self.end(end);
        }
    }
}
