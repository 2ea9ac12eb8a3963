//! Whether the body of a connection's latest request has come to its end: a refusal may be given before that.

use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll};

/// Of one connection, whose requests follow each other.
#[derive(Clone, Default)]
pub struct Unread(Arc<AtomicBool>);

impl Unread {
    pub fn any(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// The body as it comes.
pub struct Watched {
    body: Incoming,
    unread: Unread,
}

impl Watched {
    pub fn new(body: Incoming, unread: Unread) -> Self {
        let watched = Watched { body, unread };
        watched.look(false);
        watched
    }

    fn look(&self, ended: bool) {
        self.unread.0.store(!ended && !self.body.is_end_stream(), Relaxed);
    }
}

impl Body for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        self.look(matches!(polled, Poll::Ready(None)));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
