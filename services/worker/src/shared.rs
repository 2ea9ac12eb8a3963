//! What all calls of one worker share: the engine, the reservations, the identity that peers check, and the
//! ways in which work ends.

use crate::{
    Config, Role, channels::Channels, convert::Bounds, metrics::Metrics, reservations::Reservations,
};
use engine::{EngineHandle, EngineLoad};
use kv::{KvLayout, KvMemory};
use proto::{Error, ErrorCode};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub struct Shared {
    pub id: String,
    pub config: Config,
    pub engine: EngineHandle,
    pub memory: Arc<dyn KvMemory>,
    pub layout: KvLayout,
    pub layout_fingerprint: u64,
    pub weights_fingerprint: u64,
    pub bounds: Bounds,
    pub reservations: Reservations,
    pub channels: Channels,
    pub metrics: Metrics,
    load: watch::Receiver<EngineLoad>,
    /// New work is refused.
    draining: CancellationToken,
    /// Running work is given up.
    stopping: CancellationToken,
    /// Has one receiver for each call that runs.
    calls: watch::Sender<()>,
}

/// What distinguishes a loaded model to its peers.
pub struct Identity {
    pub weights_fingerprint: u64,
    pub bounds: Bounds,
}

impl Shared {
    pub fn new(config: Config, engine: EngineHandle, identity: Identity, metrics: Metrics) -> Self {
        let memory = engine.kv_memory();
        let layout = memory.layout();
        Shared {
            id: format!("{}-{}", config.role.name(), uuid::Uuid::new_v4()),
            load: engine.load(),
            layout,
            layout_fingerprint: layout.fingerprint(),
            weights_fingerprint: identity.weights_fingerprint,
            bounds: identity.bounds,
            reservations: Reservations::new(memory.blocks() as usize),
            channels: Channels::default(),
            draining: CancellationToken::new(),
            stopping: CancellationToken::new(),
            calls: watch::Sender::new(()),
            memory,
            engine,
            config,
            metrics,
        }
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

    /// A running sequence means that steps follow each other; a waiting one may wait for blocks that others hold.
    pub fn heartbeat(&self) -> proto::Heartbeat {
        let load = self.load();
        let longest = load.longest_step.as_millis();
        proto::Heartbeat {
            step: load.step,
            working: load.running > 0,
            longest_step_ms: u32::try_from(longest).unwrap_or(u32::MAX),
        }
    }

    pub fn heartbeat_every(&self) -> Duration {
        Duration::from_millis(self.config.liveness.heartbeat_ms)
    }

    /// Whether new work is taken.
    pub fn admit(&self) -> Result<(), Error> {
        if self.draining.is_cancelled() {
            return Err(self.leaving());
        }
        Ok(())
    }

    fn leaving(&self) -> Error {
        Error::new(ErrorCode::Draining, format!("worker {} is leaving the cluster", self.id))
    }

    /// Runs one call in a task, which [`Self::drain`] waits for.
    pub fn spawn(&self, call: impl Future<Output = ()> + Send + 'static) {
        let running = self.calls.subscribe();
        tokio::spawn(async move {
            call.await;
            drop(running);
        });
    }

    /// Takes no new work, and waits for what runs, at last by giving it up.
    pub async fn drain(&self, patience: Duration) {
        self.draining.cancel();
        if tokio::time::timeout(patience, self.calls.closed()).await.is_ok() {
            return;
        }
        tracing::warn!(calls = self.calls.receiver_count(), ?patience, "gave up waiting for running calls");
        self.stopping.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.calls.closed()).await;
    }

    /// Resolves with the reason when running work has to be given up.
    pub async fn ended(&self) -> Error {
        tokio::select! {
            cause = self.engine.stopped() => engine_lost(&cause),
            () = self.stopping.cancelled() => self.leaving(),
        }
    }
}

pub fn engine_lost(cause: &str) -> Error {
    Error::new(ErrorCode::WorkerLost, format!("the engine of this worker stopped: {cause}"))
}
