//! What all calls of one worker share: the engine, the reservations, the identity that peers check, and the
//! ways in which work ends.

use crate::{
    Config, Role, Transport, channels::Channels, convert::Bounds, metrics::Metrics,
    reservations::Reservations,
};
use engine::{EngineHandle, EngineLoad};
use handoff::{Patience, direct::Pool, liveness, nixl};
use kv::{KvLayout, KvMemory};
use proto::{Dial, Error, ErrorCode, latency::Meter};
use std::{future::Future, sync::Arc, time::Duration};
use telemetry::{Spans, spans::Span, trace::TraceContext};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

pub struct Shared {
    pub id: String,
    pub config: Config,
    pub engine: EngineHandle,
    /// The engine's blocks, and how others get their bytes.
    pub pool: Pool,
    pub layout: KvLayout,
    pub layout_fingerprint: u64,
    pub weights_fingerprint: u64,
    pub files_fingerprint: u64,
    pub bounds: Bounds,
    pub reservations: Reservations,
    pub channels: Channels,
    pub metrics: Metrics,
    pub spans: Spans,
    load: watch::Receiver<EngineLoad>,
    /// New work is refused.
    draining: CancellationToken,
    /// Running work goes to other workers; only what is computed and on offer is still delivered.
    moving: CancellationToken,
    /// Everything is given up.
    stopping: CancellationToken,
    /// Has one receiver for each call that runs.
    calls: watch::Sender<()>,
    /// Has one receiver for each hand-off that the device is late with.
    stalls: watch::Sender<()>,
}

/// What distinguishes a loaded model to its peers.
pub struct Identity {
    pub weights_fingerprint: u64,
    /// Of what gateways read of the model.
    pub files_fingerprint: u64,
    pub bounds: Bounds,
}

/// A call that has ended.
pub struct Told {
    pub name: &'static str,
    pub request_id: String,
    pub from: Instant,
    pub error: Option<String>,
}

impl Shared {
    /// `id` is of this incarnation.
    pub fn new(
        id: String,
        config: Config,
        dial: Dial,
        engine: EngineHandle,
        identity: Identity,
        (metrics, spans): (Metrics, Spans),
    ) -> Result<Self, crate::Error> {
        let memory = engine.kv_memory();
        let layout = memory.layout();
        Ok(Shared {
            pool: pool(config.handoff.transport, &id, &memory).map_err(crate::Error::Transport)?,
            id,
            load: engine.load(),
            layout,
            layout_fingerprint: layout.fingerprint() ^ of_transport(config.handoff.transport),
            weights_fingerprint: identity.weights_fingerprint,
            files_fingerprint: identity.files_fingerprint,
            bounds: identity.bounds,
            reservations: Reservations::new(memory.blocks() as usize),
            channels: Channels::new(dial),
            draining: CancellationToken::new(),
            moving: CancellationToken::new(),
            stopping: CancellationToken::new(),
            calls: watch::Sender::new(()),
            stalls: watch::Sender::new(()),
            engine,
            config,
            metrics,
            spans,
        })
    }

    pub fn role(&self) -> Role {
        self.config.role
    }

    pub fn load(&self) -> EngineLoad {
        *self.load.borrow()
    }

    pub fn loads(&self) -> watch::Receiver<EngineLoad> {
        self.load.clone()
    }

    /// A running sequence means that steps follow each other; a waiting one may wait for blocks that others hold. A device
    /// that does not copy is at work on nothing else, so that it shows as an engine that stands still.
    pub fn heartbeat(&self) -> proto::Heartbeat {
        let load = self.load();
        let longest = load.longest_step.as_millis();
        proto::Heartbeat {
            step: load.step,
            working: load.running > 0 || self.stalled(),
            longest_step_ms: u32::try_from(longest).unwrap_or(u32::MAX),
        }
    }

    /// How long a hand-off waits for what. A copy waits for the steps before it, however long they take here.
    pub fn patience(&self) -> Patience {
        let patience = self.config.patience();
        let landing = liveness::patience(patience.landing, self.load().longest_step);
        Patience { landing, ..patience }
    }

    pub fn heartbeat_every(&self) -> Duration {
        Duration::from_millis(self.config.liveness.heartbeat_ms)
    }

    /// The device has not copied in time, until what this gives is dropped.
    pub fn stall(&self) -> watch::Receiver<()> {
        self.stalls.subscribe()
    }

    fn stalled(&self) -> bool {
        self.stalls.receiver_count() > 0
    }

    /// Whether new work is taken.
    pub fn admit(&self) -> Result<(), Error> {
        if self.draining.is_cancelled() {
            return Err(self.leaving());
        }
        if self.stalled() {
            return Err(engine_lost("its device has not copied a block in time, and still does not"));
        }
        Ok(())
    }

    /// Whether this incarnation is the one that is meant; an address may have passed to another.
    pub fn check_member(&self, meant: &str) -> Result<(), Error> {
        if meant.is_empty() || meant == self.id {
            return Ok(());
        }
        let message = format!("member {meant} has left this address; {} is here now", self.id);
        Err(Error::new(ErrorCode::Draining, message))
    }

    fn leaving(&self) -> Error {
        Error::new(ErrorCode::Draining, format!("worker {} is leaving the cluster", self.id))
    }

    /// Tells what one call did: the whole of it, and the stretches that were measured.
    pub fn tell(&self, call: Told, trace: TraceContext, meter: &Meter) {
        if !self.spans.wants(&trace) {
            return;
        }
        for lap in meter.laps() {
            self.spans.tell(Span::part(&trace, lap.name.label(), lap.from, lap.to).with("baton.of", lap.of));
        }
        let request_id = call.request_id.into();
        self.spans.tell(Span {
            context: trace,
            name: call.name.into(),
            serves: true,
            from: call.from,
            to: Instant::now(),
            attributes: vec![("baton.request_id", request_id), ("baton.member", self.id.clone().into())],
            error: call.error,
        });
    }

    /// Runs one call in a task, which [`Self::drain`] waits for.
    pub fn spawn(&self, call: impl Future<Output = ()> + Send + 'static) {
        let running = self.calls.subscribe();
        tokio::spawn(async move {
            call.await;
            drop(running);
        });
    }

    /// Takes no new work and waits for what runs; what lasts too long goes to other workers.
    pub async fn drain(&self) {
        self.draining.cancel();
        let waits = [(self.config.drain_ms, &self.moving), (self.config.handover_ms, &self.stopping)];
        for (patience, next) in waits {
            let patience = Duration::from_millis(patience);
            if tokio::time::timeout(patience, self.calls.closed()).await.is_ok() {
                return;
            }
            tracing::info!(calls = self.calls.receiver_count(), ?patience, "what still runs goes elsewhere");
            next.cancel();
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), self.calls.closed()).await;
    }

    /// Resolves with the reason when running work has to be given up. `delivers`: it is computed and on offer.
    pub async fn ended(&self, delivers: bool) -> Error {
        let given_up = if delivers { &self.stopping } else { &self.moving };
        tokio::select! {
            cause = self.engine.stopped() => engine_lost(&cause),
            () = given_up.cancelled() => self.leaving(),
        }
    }
}

/// Workers of different transports cannot pass blocks to each other: as if their layouts differed.
fn of_transport(transport: Transport) -> u64 {
    match transport {
        Transport::Grpc => 0,
        Transport::Nixl => 0x6e69_786c,
    }
}

pub fn engine_lost(cause: &str) -> Error {
    Error::new(ErrorCode::WorkerLost, format!("the engine of this worker stopped: {cause}"))
}

/// `id` names this incarnation: what others know of its memory dies with it.
fn pool(transport: Transport, id: &str, memory: &Arc<dyn KvMemory>) -> Result<Pool, handoff::Error> {
    match transport {
        Transport::Grpc => Ok(memory.clone().into()),
        Transport::Nixl => Pool::direct(memory.clone(), nixl::open(id, &**memory)?),
    }
}
