//! One direction of a connection: bytes that arrive in order, some time after they were sent, and not at all
//! while the way is blocked. Bounded like a socket's buffer. Knows nothing of who is at its ends.

use std::{
    collections::VecDeque,
    io,
    task::{Context, Poll, Waker},
};
use tokio::time::Instant;

/// Bytes sent and not yet read.
const ROOM: usize = 256 << 10;

#[derive(Default)]
pub struct Pipe {
    sent: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// When what was sent last arrives: nothing overtakes.
    last: Option<Instant>,
    /// The writer will send nothing more.
    finished: bool,
    /// The reader takes nothing more.
    abandoned: bool,
    /// Both ends learn of it at once.
    broken: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// What a reader finds.
pub enum Found {
    Bytes(Vec<u8>),
    End,
    /// Nothing before then; `None`: until woken.
    Later(Option<Instant>),
}

impl Pipe {
    /// Takes what there is room for. `deaf`: the writer cannot learn yet that the reader has gone.
    pub fn send(
        &mut self,
        context: &mut Context<'_>,
        bytes: &[u8],
        arrives: Instant,
        deaf: bool,
    ) -> Poll<io::Result<usize>> {
        if self.broken || self.finished || (self.abandoned && !deaf) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.abandoned {
            return Poll::Ready(Ok(bytes.len()));
        }
        let fits = bytes.len().min(ROOM.saturating_sub(self.bytes));
        if fits == 0 {
            self.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let arrives = self.last.map_or(arrives, |last| last.max(arrives));
        self.last = Some(arrives);
        self.bytes += fits;
        self.sent.push_back((arrives, bytes[..fits].to_vec()));
        self.wake_reader();
        Poll::Ready(Ok(fits))
    }

    pub fn receive(&mut self, context: &mut Context<'_>, most: usize, blocked: bool) -> io::Result<Found> {
        if self.broken {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        self.reader = Some(context.waker().clone());
        if blocked {
            return Ok(Found::Later(None));
        }
        let Some((arrives, bytes)) = self.sent.front_mut() else {
            return Ok(if self.finished { Found::End } else { Found::Later(None) });
        };
        if *arrives > Instant::now() {
            return Ok(Found::Later(Some(*arrives)));
        }
        let rest = bytes.split_off(most.min(bytes.len()));
        let taken = std::mem::replace(bytes, rest);
        if bytes.is_empty() {
            self.sent.pop_front();
        }
        self.bytes -= taken.len();
        self.writer.take().into_iter().for_each(Waker::wake);
        Ok(Found::Bytes(taken))
    }

    pub fn finish(&mut self) {
        self.finished = true;
        self.wake_reader();
    }

    pub fn abandon(&mut self) {
        self.abandoned = true;
        self.sent.clear();
        self.writer.take().into_iter().for_each(Waker::wake);
    }

    pub fn break_off(&mut self) {
        self.broken = true;
        self.sent.clear();
        self.wake();
    }

    /// Both ends look again.
    pub fn wake(&mut self) {
        self.wake_reader();
        self.writer.take().into_iter().for_each(Waker::wake);
    }

    fn wake_reader(&mut self) {
        self.reader.take().into_iter().for_each(Waker::wake);
    }
}
