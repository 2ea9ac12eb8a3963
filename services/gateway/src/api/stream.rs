//! An answer as server-sent events: one serialisation per chunk, chunks that are ready together sent
//! together, a comment when nothing comes for long. It runs in a task of its own, so that a client that
//! takes nothing for too long is given up; a client that leaves ends it at once.

use super::shape::Shape;
use crate::answer::{Event, Generation, Step};
use crate::model::Model;
use crate::observe::Observation;
use crate::record::Record;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{FutureExt, Stream};
use openai::{Envelope, Error, Streaming, Usage};
use serde::Serialize;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::Instrument;

/// What stands around every chunk of an answer.
pub struct Heading {
    pub id: String,
    pub created: u64,
    /// As the client asked for it.
    pub model: String,
}

const FINGERPRINT: &str = concat!("baton-", env!("CARGO_PKG_VERSION"));

impl Heading {
    pub fn envelope<'a, C>(
        &'a self,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<Usage>>,
    ) -> Envelope<'a, C> {
        Envelope {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
        }
    }
}

/// An answer, or its last chunk, with the record of the request beside what OpenAI has there: clients read past
/// fields that they do not know.
#[derive(Serialize)]
pub struct WithRecord<'a, C> {
    #[serde(flatten)]
    pub envelope: Envelope<'a, C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub baton: Option<Record>,
}

pub struct Events<S> {
    pub generation: Generation,
    pub shape: S,
    pub heading: Heading,
    pub streaming: Streaming,
    pub model: Arc<Model>,
    /// Longest silence; zero: no comments.
    pub keep_alive: Duration,
    pub observation: Arc<Observation>,
    /// The last chunk is to carry the record of the request.
    pub wants_record: bool,
    /// An event taken from the generation before the headers went out.
    pub first: Option<(u32, Event)>,
    pub over: bool,
}

const COMMENT: Bytes = Bytes::from_static(b": keep-alive\n\n");
/// What is sent in one piece, at most, unless a single chunk is larger.
const PIECE: usize = 16 << 10;
/// Pieces that wait for the client.
const PIECES: usize = 4;

impl<S: Shape> Events<S> {
    /// The body of the response. Dropping it ends the generation.
    pub fn stream(self, patience: Duration) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        let (out, mut pieces) = mpsc::channel(PIECES);
        tokio::spawn(self.pump(out, patience).in_current_span());
        futures::stream::poll_fn(move |context| pieces.poll_recv(context).map(|piece| piece.map(Ok)))
    }

    async fn pump(mut self, out: mpsc::Sender<Bytes>, patience: Duration) {
        loop {
            let piece = tokio::select! {
                biased;
                () = out.closed() => return,
                piece = self.piece() => piece,
            };
            let Some(piece) = piece else { return };
            if out.send_timeout(piece, patience).await.is_err() {
                return tracing::debug!("the client left, or took nothing for {patience:?}");
            }
        }
    }

    async fn piece(&mut self) -> Option<Bytes> {
        if self.over {
            return None;
        }
        let mut out = BytesMut::with_capacity(512);
        if let Some((index, event)) = self.first.take() {
            self.event(index, event, &mut out);
        }
        if out.is_empty() && self.wait(&mut out).await.is_none() {
            return Some(COMMENT);
        }
        while !self.over && out.len() < PIECE {
            let Some(next) = self.generation.next().now_or_never() else { break };
            self.take(next, &mut out);
        }
        Some(out.freeze())
    }

    /// Until something is written; `None` when it is time for a comment.
    async fn wait(&mut self, out: &mut BytesMut) -> Option<()> {
        let silence = tokio::time::sleep(self.keep_alive);
        tokio::pin!(silence);
        while out.is_empty() {
            let next = tokio::select! {
                biased;
                next = self.generation.next() => next,
                () = &mut silence, if !self.keep_alive.is_zero() => return None,
            };
            self.take(next, out);
        }
        Some(())
    }

    fn take(&mut self, next: Option<Result<(u32, Event), Error>>, out: &mut BytesMut) {
        match next {
            Some(Ok((index, event))) => self.event(index, event, out),
            Some(Err(error)) => self.fail(&error, out),
            None => self.finish(out),
        }
    }

    fn event(&mut self, index: u32, event: Event, out: &mut BytesMut) {
        match event {
            Event::Started(_) => {
                if let Some(chunk) = self.shape.opening(index) {
                    self.chunk(chunk, out);
                }
            }
            Event::Echo(step) | Event::Step(step) => self.step(index, step, out),
        }
    }

    fn step(&mut self, index: u32, mut step: Step, out: &mut BytesMut) {
        let (finish, sampled) = (step.finish.take(), step.sampled);
        if !step.text.is_empty() || !step.tokens.is_empty() {
            let chunk = self.shape.chunk(&self.model, index, step);
            self.chunk(chunk, out);
        }
        if let Some(finish) = finish {
            let chunk = self.shape.ending(index, finish);
            self.chunk(chunk, out);
        }
        self.observation.written(index, sampled);
    }

    fn chunk(&self, chunk: S::Chunk, out: &mut BytesMut) {
        let usage = match self.streaming {
            Streaming { continuous_usage: true, .. } => Some(Some(self.generation.usage())),
            Streaming { include_usage: true, .. } => Some(None),
            _ => None,
        };
        write(&self.heading.envelope(S::CHUNK, &[chunk], usage), out);
    }

    fn finish(&mut self, out: &mut BytesMut) {
        if self.streaming.include_usage || self.wants_record {
            let usage = self.streaming.include_usage.then(|| Some(self.generation.usage()));
            let envelope = self.heading.envelope::<S::Chunk>(S::CHUNK, &[], usage);
            let baton = self.wants_record.then(|| self.observation.record(200));
            write(&WithRecord { envelope, baton }, out);
        }
        out.put_slice(b"data: [DONE]\n\n");
        self.over = true;
        self.observation.end(200);
    }

    fn fail(&mut self, error: &Error, out: &mut BytesMut) {
        tracing::warn!(request_id = %self.observation.request_id, %error, "answer broken off");
        write(&error.body(), out);
        self.over = true;
        self.observation.end(error.code.status());
    }
}

fn write(value: &impl Serialize, out: &mut BytesMut) {
    out.put_slice(b"data: ");
    // Writing JSON to memory fails only for maps with keys that are no strings; there are none.
    let written = serde_json::to_writer((&mut *out).writer(), value);
    debug_assert!(written.is_ok());
    out.put_slice(b"\n\n");
}
