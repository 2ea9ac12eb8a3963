//! The decode service: reserves blocks, takes a hand-off into them, decodes. A worker of role both also runs
//! whole sequences here. One call is one sequence's life; its end, however it comes, frees everything.

use crate::{
    call::{Call, Stop, Stream, stopped_by},
    convert,
    reservations::Entry,
    shared::{Shared, Told, engine_lost},
};
use engine::{Computed, Event, FirstToken, Reservation, Running, SequenceSpec};
use handoff::{
    digest,
    receive::{Inbox, Incoming, Outcome, Plan, Received},
    receiver::Answer,
};
use proto::{
    DecodeEvent, Error, ErrorCode, Latency, Place, decode_call::Call as Ask, decode_event::Event as Wire,
    latency::Meter,
};
use std::{sync::Arc, time::Duration};
use telemetry::{
    phase::{self, Phase},
    spans::Span,
    trace::{self, TraceContext},
};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

const UNREAD: &str = "a block could not be read from the prefill worker's memory";

#[derive(Clone)]
pub struct DecodeService(pub Arc<Shared>);

impl Stream for DecodeEvent {
    fn heartbeat(heartbeat: proto::Heartbeat) -> Self {
        event(Wire::Heartbeat(heartbeat))
    }

    fn error(error: Error) -> Self {
        event(Wire::Error(error))
    }
}

fn event(event: Wire) -> DecodeEvent {
    DecodeEvent { event: Some(event), latency: None }
}

#[tonic::async_trait]
impl proto::decode_server::Decode for DecodeService {
    type GenerateStream = ReceiverStream<Result<DecodeEvent, Status>>;

    async fn generate(
        &self,
        request: Request<Streaming<proto::DecodeCall>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let from = Instant::now();
        let trace = self.0.spans.context(trace::extract(request.metadata()));
        let (call, stream) = Call::open(self.0.clone());
        let (asks, meter) = (Some(request.into_inner()), Meter::start(from));
        let mut life = Life { call, asks, seen: None, trace, meter, prefills: false };
        self.0.spawn(async move {
            let mut request_id = String::new();
            let outcome = match life.start().await {
                Ok(start) => {
                    request_id = start.sequence.as_ref().map_or_else(String::new, |s| s.request_id.clone());
                    let span = trace::span("decode", &trace, &request_id);
                    life.live(start).instrument(span).await
                }
                Err(stop) => Err(stop),
            };
            let told =
                Told { name: "baton.v1.Decode/Generate", request_id, from, error: stopped_by(&outcome) };
            life.call.shared.tell(told, trace, &life.meter);
            life.call.end(outcome).await;
        });
        Ok(Response::new(stream))
    }
}

struct Life {
    call: Call<DecodeEvent>,
    /// `None` once the router has said that it will ask nothing more.
    asks: Option<Streaming<proto::DecodeCall>>,
    /// Position of a token that the client has and is not told again.
    seen: Option<u32>,
    trace: TraceContext,
    /// Of the tokens that are measured here.
    meter: Meter,
    /// The next token is the first, and computed here.
    prefills: bool,
}

impl Life {
    async fn start(&mut self) -> Result<proto::DecodeStart, Stop> {
        let patience = Duration::from_millis(self.call.shared.config.liveness.silence_ms);
        match tokio::time::timeout(patience, self.ask()).await {
            Ok(Ok(Ask::Start(start))) => Ok(start),
            Ok(Ok(_)) => Err(invalid("a call begins with `start`")),
            Ok(Err(stop)) => Err(stop),
            Err(_) => Err(Error::new(ErrorCode::Deadline, "the call did not start in time").into()),
        }
    }

    async fn live(&mut self, start: proto::DecodeStart) -> Result<(), Stop> {
        let shared = self.call.shared.clone();
        shared.check_member(&start.member)?;
        shared.admit()?;
        check_role(&shared, start.prefill_here)?;
        let spec = shared.bounds.spec(start.sequence, start.forced)?;
        if start.prefill_here { self.run_here(spec).await } else { self.take_over(spec).await }
    }

    /// Whole sequence on this worker.
    async fn run_here(&mut self, spec: SequenceSpec) -> Result<(), Stop> {
        let engine = self.call.shared.engine.clone();
        self.seen = spec.forced.map(|_| spec.tokens.len() as u32);
        self.prefills = true;
        let running = self.unless_stopped(engine.generate(spec)).await?.map_err(convert::refused)?;
        self.stream(running).await
    }

    /// Reservation, hand-off, decode.
    async fn take_over(&mut self, spec: SequenceSpec) -> Result<(), Stop> {
        let shared = self.call.shared.clone();
        let layout = shared.layout;
        let bindings = digest::bindings(&spec.tokens, layout.block_tokens, shared.layout_fingerprint);
        let asked = self.unless_stopped(shared.engine.reserve(spec)).await?;
        let reservation = asked.map_err(convert::refused)?;
        let plan = Plan {
            blocks: reservation.blocks.clone(),
            present: reservation.present,
            bindings,
            weights_fingerprint: shared.weights_fingerprint,
            patience: shared.patience(),
        };
        let (blocks_present, blocks_needed) = (plan.present, plan.bindings.len() as u32);
        let reserved = proto::Reserved { blocks_present, blocks_needed, ..Default::default() };
        let engine = shared.engine.clone();
        let (mut incoming, inbox) = Incoming::new(plan, shared.pool.clone(), move || engine.last_submitted());
        let outcome = self.receive(&mut incoming, inbox, reserved).await;
        self.received(&incoming.received(), &outcome);
        let stalled = matches!(outcome, Ok(Outcome::Stalled));
        let reservation = settle(&shared, reservation, incoming, stalled).await;
        match (outcome?, reservation) {
            (Outcome::Complete(commit), Some(reservation)) => self.decode(reservation, commit).await,
            (Outcome::Finished(commit), reservation) => {
                drop(reservation);
                self.finished_at_once(commit).await
            }
            (Outcome::Stalled, _) => Err(engine_lost("its device has not copied a block in time").into()),
            (Outcome::Severed, _) => Err(Error::new(ErrorCode::PeerLost, UNREAD).into()),
            _ => Err(Error::new(ErrorCode::Deadline, "no prefill delivered in time").into()),
        }
    }

    fn received(&self, received: &Received, outcome: &Result<Outcome, Stop>) {
        let shared = &self.call.shared;
        shared.metrics.handed_off(received, outcome);
        if received.blocks > 0 && shared.spans.wants(&self.trace) {
            let now = Instant::now();
            let span = Span::part(&self.trace, "receive", now - received.elapsed, now);
            let (blocks, bytes) = (i64::from(received.blocks), received.bytes as i64);
            shared.spans.tell(span.with("baton.blocks", blocks).with("baton.bytes", bytes));
        }
    }

    /// Until everything is here, or nothing will be.
    async fn receive(
        &mut self,
        incoming: &mut Incoming,
        inbox: Inbox,
        reserved: proto::Reserved,
    ) -> Result<Outcome, Stop> {
        let entry = self.call.shared.reservations.insert(inbox)?;
        let (reservation, epoch) = (entry.id(), incoming.epoch());
        self.emit(Wire::Reserved(proto::Reserved { reservation, epoch, ..reserved })).await?;
        self.attend(incoming, &entry).await
    }

    async fn attend(&mut self, incoming: &mut Incoming, entry: &Entry) -> Result<Outcome, Stop> {
        loop {
            let advance = tokio::select! {
                outcome = incoming.run() => return Ok(outcome),
                ask = self.ask() => advance(ask?)?,
            };
            if advance.reservation != entry.id() {
                return Err(invalid("`advance.reservation` is not the one of this call"));
            }
            self.advanced(incoming.advance(advance.epoch)).await?;
        }
    }

    async fn advanced(&mut self, answer: Answer) -> Result<(), Stop> {
        match answer {
            Answer::Advanced { epoch, accepted } => {
                self.emit(Wire::Advanced(proto::Advanced { epoch, accepted })).await
            }
            Answer::AlreadyComplete => self.emit(Wire::AlreadyComplete(proto::AlreadyComplete {})).await,
            Answer::NoSuchEpoch { current } => {
                let message = format!("`advance.epoch` does not exist yet; the current one is {current}");
                Err(invalid(&message))
            }
        }
    }

    async fn decode(&mut self, reservation: Reservation, commit: proto::Commit) -> Result<(), Stop> {
        let first = commit.first_token.ok_or_else(|| invalid("`commit.first_token` is missing"))?;
        // From before the engine may begin: it can have the token before this task goes on.
        self.meter = Meter::after_first(Instant::now());
        let running = reservation.activate(FirstToken(first.id)).await;
        self.emit(Wire::Decoding(proto::Decoding { first_token: Some(first) })).await?;
        self.stream(running).await
    }

    async fn finished_at_once(&mut self, commit: proto::Commit) -> Result<(), Stop> {
        let (reason, stop_token) = (commit.finished.unwrap_or_default(), commit.stop_token);
        self.emit(Wire::Decoding(proto::Decoding { first_token: commit.first_token })).await?;
        self.emit(Wire::Finished(proto::DecodeFinished { reason, stop_token })).await
    }

    /// Passes on what the engine says, to the end.
    async fn stream(&mut self, mut running: Running) -> Result<(), Stop> {
        let mut at = Phase::Committed;
        loop {
            tokio::select! {
                event = phase::after(at, running.events.recv()) => {
                    at = Phase::Decoding;
                    if self.pass(event).await? {
                        return Ok(());
                    }
                }
                ask = self.ask() => {
                    advance(ask?)?;
                    self.advanced(Answer::AlreadyComplete).await?;
                }
            }
        }
    }

    /// Whether that was the last event.
    async fn pass(&mut self, event: Option<Event>) -> Result<bool, Stop> {
        let mut latency = None;
        let wire = match event {
            Some(Event::Started { cached_tokens }) => {
                Wire::LocalPrefill(proto::LocalPrefill { cached_tokens: cached_tokens as u32 })
            }
            Some(Event::PromptLogprob { position, logprobs }) => {
                Wire::PromptLogprob(convert::prompt_logprob(position, logprobs))
            }
            Some(Event::Token { position, .. }) if self.seen == Some(position) => return Ok(false),
            Some(Event::Token { position, token, computed }) => {
                latency = self.measured(computed);
                Wire::Token(convert::token(position, token))
            }
            Some(Event::Finished(finish)) => {
                let (reason, stop_token) = convert::finish(finish);
                Wire::Finished(proto::DecodeFinished { reason: reason as i32, stop_token })
            }
            Some(Event::Preempted) => Wire::Preempted(proto::Preempted {}),
            Some(Event::Failed(cause)) => return Err(Error::new(ErrorCode::Internal, cause).into()),
            Some(event @ Event::Computed { .. }) => return Err(convert::unexpected(&event).into()),
            None => return Err(engine_lost("it dropped the sequence").into()),
        };
        let last = matches!(wire, Wire::Finished(_) | Wire::Preempted(_));
        self.call.emit(DecodeEvent { event: Some(wire), latency }).await?;
        Ok(last)
    }

    fn measured(&mut self, computed: Option<Computed>) -> Option<Latency> {
        let (measure, place): (fn(&mut Meter, _), _) = match std::mem::take(&mut self.prefills) {
            true => (convert::prefilled, Place::Prefill),
            false => (convert::decoded, Place::Decode),
        };
        measure(&mut self.meter, computed);
        self.meter.token(place)
    }

    async fn emit(&mut self, wire: Wire) -> Result<(), Stop> {
        self.call.emit(event(wire)).await
    }

    async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Stop> {
        tokio::select! {
            done = work => Ok(done),
            stop = self.call.stopped() => Err(stop),
        }
    }

    /// The router's next word; errors when the call has to end. Cancel-safe.
    async fn ask(&mut self) -> Result<Ask, Stop> {
        loop {
            let message = match &mut self.asks {
                None => return Err(self.call.stopped().await),
                Some(asks) => tokio::select! {
                    message = asks.message() => message,
                    stop = self.call.stopped() => return Err(stop),
                },
            };
            match message {
                Ok(Some(proto::DecodeCall { call: Some(Ask::Cancel(_)) })) | Err(_) => {
                    return Err(Stop::Gone);
                }
                Ok(Some(proto::DecodeCall { call: Some(ask) })) => return Ok(ask),
                // A message of a kind this version does not know.
                Ok(Some(proto::DecodeCall { call: None })) => {}
                // Half-closed: it listens and will ask nothing more.
                Ok(None) => self.asks = None,
            }
        }
    }
}

/// Ends the hand-off. The reservation, unless something still writes into its blocks: these are then quarantined until
/// it has ended, and the others free. `stalled`: it is overdue, and until then this worker is no good to anybody. A drain does
/// not wait: what writes ends with the process, and may not end before.
async fn settle(
    shared: &Arc<Shared>,
    reservation: Reservation,
    incoming: Incoming,
    stalled: bool,
) -> Option<Reservation> {
    let Some(unsettled) = incoming.close() else { return Some(reservation) };
    let stall = stalled.then(|| shared.stall());
    let quarantine = reservation.quarantine(unsettled.writing()).await;
    let metrics = shared.metrics.clone();
    tokio::spawn(async move {
        unsettled.settle(|received| metrics.late(&received)).await;
        drop((quarantine, stall));
    });
    None
}

fn invalid(message: &str) -> Stop {
    Stop::Failed(Error::new(ErrorCode::InvalidRequest, message))
}

/// The only thing to ask of a call that has started.
fn advance(ask: Ask) -> Result<proto::Advance, Stop> {
    match ask {
        Ask::Advance(advance) => Ok(advance),
        Ask::Start(_) | Ask::Cancel(_) => Err(invalid("a call starts once")),
    }
}

fn check_role(shared: &Shared, prefill_here: bool) -> Result<(), Error> {
    let role = shared.role();
    let fits = if prefill_here { role == crate::Role::Both } else { role.decodes() };
    if fits {
        return Ok(());
    }
    let what = if prefill_here { "runs no whole sequences" } else { "decodes nothing" };
    let message = format!("worker {} has role {} and {what}", shared.id, role.name());
    Err(Error::new(ErrorCode::InvalidRequest, message))
}
