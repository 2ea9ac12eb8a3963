//! Calls to workers: a stream of events that ends in an error when the worker falls silent, hangs behind a
//! live socket, or closes without a last word. Heartbeats end here. Dropping a call cancels it, and the
//! worker frees what it holds.

use futures::{StreamExt, TryFutureExt, stream::BoxStream};
use handoff::liveness::{Liveness, Verdict};
use proto::{
    DecodeCall, DecodeEvent, DecodeStart, Error, ErrorCode, Heartbeat, Member, PrefillEvent, PrefillRequest,
    decode_call::Call, decode_client::DecodeClient, decode_event, prefill_client::PrefillClient,
    prefill_event,
};
use std::{future::Future, sync::Arc, time::Duration};
use telemetry::trace::{TraceContext, inject};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Channel};

/// What goes to a decode worker during one call: start, and an advance for each prefill lost.
const CALLS: usize = 8;

/// A failed call.
#[derive(Clone, Debug)]
pub struct Failure {
    pub error: Error,
    /// The worker itself is in doubt, not only this request on it.
    pub lost: bool,
}

impl Failure {
    /// The worker leaves in good order: nobody's fault.
    pub fn is_draining(&self) -> bool {
        self.error.code() == ErrorCode::Draining
    }

    /// A prefill member's word about decode: either of them, or the way between them, may be at fault.
    pub fn is_between_workers(&self) -> bool {
        use ErrorCode::{Digest, PeerLost, StaleEpoch, UnknownReservation};
        matches!(self.error.code(), PeerLost | UnknownReservation | StaleEpoch | Digest)
    }
}

/// Events of a worker as they come.
pub struct Listening<E> {
    events: BoxStream<'static, Result<E, Status>>,
    member: Arc<Member>,
    liveness: Liveness,
    since: Instant,
    silence: Duration,
    /// Silent until then: lost.
    deadline: Instant,
}

/// Messages that may be heartbeats or errors.
pub trait Event {
    /// The message itself, unless it is a heartbeat, an error, or empty.
    fn sort(self) -> Sorted<Self>
    where
        Self: Sized;
}

pub enum Sorted<E> {
    Event(E),
    Heartbeat(Heartbeat),
    Error(Error),
    Empty,
}

/// One sequence's life on a decode worker.
pub struct DecodeStream {
    calls: mpsc::Sender<DecodeCall>,
    pub events: Listening<DecodeEvent>,
}

impl DecodeStream {
    pub fn open(to: Peer, start: DecodeStart) -> Self {
        let (calls, outgoing) = mpsc::channel(CALLS);
        let first = DecodeCall { call: Some(Call::Start(start)) };
        let _ = calls.try_send(first);
        let request = to.request(ReceiverStream::new(outgoing));
        let mut client =
            DecodeClient::new(to.channel.clone()).max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
        let call = async move { client.generate(request).await };
        DecodeStream { calls, events: Listening::new(to, call) }
    }

    /// Whether there was room; there always is for a worker that reads.
    pub fn send(&self, call: Call) -> bool {
        self.calls.try_send(DecodeCall { call: Some(call) }).is_ok()
    }
}

/// Asks a worker to prefill.
pub fn prefill(to: Peer, request: PrefillRequest) -> Listening<PrefillEvent> {
    let request = to.request(request);
    let mut client = PrefillClient::new(to.channel.clone())
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    Listening::new(to, async move { client.prefill(request).await })
}

/// A worker to call.
pub struct Peer {
    pub member: Arc<Member>,
    pub channel: Channel,
    pub trace: TraceContext,
    pub silence: Duration,
}

impl Peer {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        inject(&self.trace, request.metadata_mut());
        request
    }
}

impl<E: Event + Send + 'static> Listening<E> {
    /// The call is made when the first event is awaited, and under the same deadline.
    fn new(
        to: Peer,
        call: impl Future<Output = Result<Response<Streaming<E>>, Status>> + Send + 'static,
    ) -> Self {
        let events = call.map_ok(Response::into_inner).try_flatten_stream().boxed();
        let liveness = Liveness::new(to.silence, Duration::ZERO);
        let (since, silence) = (Instant::now(), to.silence);
        Listening { events, member: to.member, liveness, since, silence, deadline: since + silence }
    }

    pub fn member(&self) -> &Arc<Member> {
        &self.member
    }

    /// The next event that is not a heartbeat. Loses nothing when cancelled.
    pub async fn next(&mut self) -> Result<E, Failure> {
        loop {
            let Ok(heard) = timeout_at(self.deadline, self.events.next()).await else {
                let silence = format!("said nothing for {:.1} s", self.silence.as_secs_f32());
                return Err(self.lost(ErrorCode::WorkerLost, &silence));
            };
            self.deadline = Instant::now() + self.silence;
            let message = match heard {
                Some(Ok(message)) => message,
                Some(Err(status)) => return Err(self.broke(status)),
                None => return Err(self.lost(ErrorCode::WorkerLost, "closed its stream before the end")),
            };
            match message.sort() {
                Sorted::Event(event) => return Ok(event),
                Sorted::Heartbeat(beat) => self.beat(&beat)?,
                Sorted::Error(error) => return Err(Failure { error: reported(error), lost: false }),
                Sorted::Empty => return Err(self.lost(ErrorCode::Internal, "sent an empty message")),
            }
        }
    }

    fn beat(&mut self, beat: &Heartbeat) -> Result<(), Failure> {
        let now = self.since.elapsed();
        let longest = Duration::from_millis(beat.longest_step_ms.into());
        self.liveness.heartbeat(beat.step, beat.working, longest, now);
        match self.liveness.verdict(now) {
            Verdict::Stuck => Err(self.lost(ErrorCode::WorkerLost, "has work, but its engine stands still")),
            Verdict::Alive | Verdict::Silent => Ok(()),
        }
    }

    fn broke(&self, status: Status) -> Failure {
        let error = reported(Error::from(status));
        match error.code() {
            ErrorCode::WorkerLost => self.lost(ErrorCode::WorkerLost, &error.message),
            _ => Failure { error, lost: false },
        }
    }

    fn lost(&self, code: ErrorCode, what: &str) -> Failure {
        let Member { id, address, .. } = &*self.member;
        Failure { error: Error::new(code, format!("worker {id} at {address} {what}")), lost: true }
    }
}

/// Nobody but the router cancels calls to workers, and only the router knows a request's deadline: a worker
/// that speaks of either is going down, or waited in vain for another worker.
fn reported(error: Error) -> Error {
    match error.code() {
        ErrorCode::Cancelled | ErrorCode::Deadline | ErrorCode::Unspecified => {
            Error::new(ErrorCode::WorkerLost, error.message)
        }
        _ => error,
    }
}

impl Event for DecodeEvent {
    fn sort(self) -> Sorted<Self> {
        match self.event {
            Some(decode_event::Event::Heartbeat(beat)) => Sorted::Heartbeat(beat),
            Some(decode_event::Event::Error(error)) => Sorted::Error(error),
            Some(_) => Sorted::Event(self),
            None => Sorted::Empty,
        }
    }
}

impl Event for PrefillEvent {
    fn sort(self) -> Sorted<Self> {
        match self.event {
            Some(prefill_event::Event::Heartbeat(beat)) => Sorted::Heartbeat(beat),
            Some(prefill_event::Event::Error(error)) => Sorted::Error(error),
            Some(_) => Sorted::Event(self),
            None => Sorted::Empty,
        }
    }
}
