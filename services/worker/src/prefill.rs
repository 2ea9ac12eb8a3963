//! The prefill service: computes a prompt up to its first token and delivers the blocks to the decode worker
//! that reserved for it, while later chunks still compute. Ending the call frees everything.

use crate::{
    call::{Call, Stop, Stream, stopped_by},
    convert,
    shared::{Shared, Told, engine_lost},
};
use engine::{ComputedBlock, Event, Finish, Running, SequenceSpec};
use handoff::{
    deliver::{Delivery, Order, Progress, Sent},
    digest,
};
use kv::StepId;
use proto::{Error, ErrorCode, Place, PrefillEvent, latency::Meter, prefill_event::Event as Wire};
use std::sync::Arc;
use telemetry::{
    phase::{self, Phase},
    trace::{self, TraceContext},
};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, metadata::MetadataMap};
use tracing::Instrument;

#[derive(Clone)]
pub struct PrefillService(pub Arc<Shared>);

impl Stream for PrefillEvent {
    fn heartbeat(heartbeat: proto::Heartbeat) -> Self {
        event(Wire::Heartbeat(heartbeat))
    }

    fn error(error: Error) -> Self {
        event(Wire::Error(error))
    }
}

fn event(event: Wire) -> PrefillEvent {
    PrefillEvent { event: Some(event), latency: None }
}

#[tonic::async_trait]
impl proto::prefill_server::Prefill for PrefillService {
    type PrefillStream = ReceiverStream<Result<PrefillEvent, Status>>;

    async fn prefill(
        &self,
        request: Request<proto::PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let from = Instant::now();
        let trace = self.0.spans.context(trace::extract(request.metadata()));
        let request = request.into_inner();
        let request_id = request.sequence.as_ref().map_or_else(String::new, |s| s.request_id.clone());
        let span = trace::span("prefill", &trace, &request_id);
        let (mut call, stream) = Call::open(self.0.clone());
        let life = async move {
            let mut meter = Meter::start(from);
            let outcome = live(&mut call, request, &trace, &mut meter).await;
            let told =
                Told { name: "baton.v1.Prefill/Prefill", request_id, from, error: stopped_by(&outcome) };
            call.shared.tell(told, trace, &meter);
            call.end(outcome).await;
        };
        self.0.spawn(life.instrument(span));
        Ok(Response::new(stream))
    }
}

async fn live(
    call: &mut Call<PrefillEvent>,
    request: proto::PrefillRequest,
    trace: &TraceContext,
    meter: &mut Meter,
) -> Result<(), Stop> {
    let shared = call.shared.clone();
    shared.check_member(&request.member)?;
    shared.admit()?;
    check_peer(&shared, &request)?;
    let forced = request.forced.clone();
    let spec = shared.bounds.spec(request.sequence.clone(), forced)?;
    let order = order(&shared, &request, &spec)?;
    let channel = shared.channels.get(&order.address).map_err(Error::from)?;
    let running = tokio::select! {
        running = phase::after(Phase::Reserved, shared.engine.prefill(spec.clone())) => running.map_err(convert::refused)?,
        stop = call.stopped() => return Err(stop),
    };
    let mut metadata = MetadataMap::new();
    trace::inject(trace, &mut metadata);
    let pulse = {
        let shared = shared.clone();
        Box::new(move || shared.heartbeat())
    };
    let options = shared.config.deliver();
    let delivery = Delivery::open(channel, order, shared.pool.clone(), pulse, options, metadata);
    Prefilling { call, running, delivery, spec, meter, phase: Phase::Prefilling, ended: None }.run().await
}

/// An ending that decode has, or that the way there has, is not this worker's.
fn undelivered(error: handoff::Error) -> Error {
    let error = Error::from(error);
    match error.code() {
        ErrorCode::WorkerLost | ErrorCode::Cancelled | ErrorCode::Deadline => {
            Error::new(ErrorCode::PeerLost, error.message)
        }
        _ => error,
    }
}

/// Before any work: blocks of this worker must mean the same to the decode worker.
fn check_peer(shared: &Shared, request: &proto::PrefillRequest) -> Result<(), Error> {
    if !shared.role().prefills() {
        let message = format!("worker {} has role {} and takes no prefills", shared.id, shared.role().name());
        return Err(Error::new(ErrorCode::InvalidRequest, message));
    }
    for (what, theirs, ours) in [
        ("KV layout", request.decode_layout, shared.layout_fingerprint),
        ("weights", request.decode_weights, shared.weights_fingerprint),
    ] {
        if theirs != ours {
            let message = format!(
                "{what} of the decode worker at {} ({theirs:016x}) differ from those of prefill worker {} ({ours:016x}); \
                 run both with the same model, KV dtype, block size and --transport",
                request.decode_address, shared.id
            );
            return Err(Error::new(ErrorCode::Mismatch, message));
        }
    }
    Ok(())
}

fn order(shared: &Shared, request: &proto::PrefillRequest, spec: &SequenceSpec) -> Result<Order, Error> {
    let bindings = digest::bindings(&spec.tokens, shared.layout.block_tokens, shared.layout_fingerprint);
    let blocks = bindings.len() as u32;
    let last = request.blocks_accepted.iter().max().map_or(0, |index| index.saturating_add(1));
    if request.blocks_present.max(last) > blocks {
        let message =
            format!("`blocks_present` or `blocks_accepted` exceed the {blocks} blocks of the sequence");
        return Err(Error::new(ErrorCode::InvalidRequest, message));
    }
    Ok(Order {
        reservation: request.reservation,
        epoch: request.epoch,
        address: request.decode_address.clone(),
        member: shared.id.clone(),
        weights_fingerprint: shared.weights_fingerprint,
        bindings,
        present: request.blocks_present,
        accepted: request.blocks_accepted.clone(),
    })
}

/// A sequence that computes and is delivered at once.
struct Prefilling<'a> {
    call: &'a mut Call<PrefillEvent>,
    running: Running,
    delivery: Delivery,
    spec: SequenceSpec,
    meter: &'a mut Meter,
    phase: Phase,
    /// Whether the first token ended the sequence; `None` until it is there.
    ended: Option<Option<Finish>>,
}

impl Prefilling<'_> {
    async fn run(mut self) -> Result<(), Stop> {
        loop {
            tokio::select! {
                event = phase::after(self.phase, self.running.events.recv()), if self.ended.is_none() => self.computed(event).await?,
                progress = self.delivery.next() => match progress.map_err(undelivered)? {
                    Progress::Release(index) => self.running.release(index),
                    Progress::Done(sent) => return self.delivered(sent).await,
                },
                stop = self.call.stopped() => return Err(stop),
            }
        }
    }

    /// One event of the engine.
    async fn computed(&mut self, event: Option<Event>) -> Result<(), Stop> {
        match event {
            Some(Event::Started { cached_tokens }) => self.started(cached_tokens).await,
            Some(Event::Computed { blocks, after }) => self.offer(blocks, after),
            Some(Event::PromptLogprob { position, logprobs }) => {
                self.emit(Wire::PromptLogprob(convert::prompt_logprob(position, logprobs))).await
            }
            Some(Event::Token { position, token, computed }) => {
                convert::prefilled(self.meter, computed);
                self.first_token(convert::token(position, token)).await
            }
            Some(Event::Failed(cause)) => Err(Error::new(ErrorCode::Internal, cause).into()),
            Some(event @ (Event::Finished(_) | Event::Preempted)) => Err(convert::unexpected(&event).into()),
            None => Err(engine_lost("it dropped the sequence").into()),
        }
    }

    async fn emit(&mut self, wire: Wire) -> Result<(), Stop> {
        self.call.emit(event(wire)).await
    }

    async fn started(&mut self, cached_tokens: usize) -> Result<(), Stop> {
        self.emit(Wire::Started(proto::PrefillStarted { cached_tokens: cached_tokens as u32 })).await
    }

    fn offer(&mut self, blocks: Vec<ComputedBlock>, after: StepId) -> Result<(), Stop> {
        self.phase = Phase::Offering;
        for computed in blocks {
            self.delivery.computed(computed.index, computed.block, after);
        }
        Ok(())
    }

    /// To the router first: the time to the first token does not wait for the transfer.
    async fn first_token(&mut self, token: proto::Token) -> Result<(), Stop> {
        let ended = convert::ends(&self.spec, token.id, self.call.shared.bounds.max_context);
        self.ended = Some(ended);
        self.call.delivers = true;
        let latency = self.meter.token(Place::Prefill);
        self.call.emit(PrefillEvent { event: Some(Wire::FirstToken(token.clone())), latency }).await?;
        let finish = ended.map(convert::finish);
        self.delivery.first_token(proto::Commit {
            first_token: Some(token),
            finished: finish.map(|(reason, _)| reason as i32),
            stop_token: finish.and_then(|(_, token)| token),
        });
        Ok(())
    }

    async fn delivered(&mut self, sent: Sent) -> Result<(), Stop> {
        let finish = self.ended.flatten().map(convert::finish);
        self.emit(Wire::Delivered(proto::Delivered {
            bytes: sent.bytes,
            blocks: sent.blocks,
            finished: finish.map(|(reason, _)| reason as i32),
            stop_token: finish.and_then(|(_, token)| token),
        }))
        .await
    }
}
