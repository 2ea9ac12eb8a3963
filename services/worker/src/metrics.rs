//! What this worker shows of itself: the pool, the steps, the hand-offs that came in. Hand-offs are counted where
//! they land, so that the sum over all workers counts each once.

use crate::{Role, Transport, call::Stop};
use engine::{EngineLoad, StepRecord};
use handoff::receive::{Outcome, Received};
use proto::{ErrorCode, Totals};
use std::sync::{Arc, Mutex, PoisonError};
use telemetry::{Registry, worker};

#[derive(Clone)]
pub struct Metrics {
    role: &'static str,
    transport: &'static str,
    inner: worker::Metrics,
    /// Told with the member's load, so that whoever sees the members can add them up.
    totals: Arc<Mutex<Totals>>,
}

impl Metrics {
    pub fn new(role: Role, transport: Transport, registry: &mut Registry) -> Self {
        let inner = worker::Metrics::new(registry);
        let transport = transport.name();
        inner.count_bytes(transport, 0);
        inner.count_refused(transport, 0);
        inner.count_overdue(transport, 0);
        Metrics { role: role.name(), transport, inner, totals: Arc::default() }
    }

    pub fn loaded(&self, load: &EngineLoad) {
        let blocks = load.blocks;
        for (state, count) in [
            ("free", blocks.free),
            ("cached", blocks.cached),
            ("held", blocks.held),
            ("quarantined", blocks.quarantined),
        ] {
            self.inner.set_blocks(self.role, state, count);
        }
        self.inner.running.set(i64::from(load.running));
        self.inner.waiting.set(i64::from(load.waiting));
    }

    pub fn totals(&self) -> Totals {
        *self.totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn total(&self, add: impl FnOnce(&mut Totals)) {
        add(&mut self.totals.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn step(&self, step: StepRecord) {
        self.total(|totals| {
            totals.completion_tokens += step.decoding as u64;
            totals.prompt_tokens += (step.tokens - step.decoding) as u64;
        });
        self.inner.observe_step(step.kind.label(), step.tokens, step.elapsed);
    }

    pub fn handed_off(&self, received: &Received, outcome: &Result<Outcome, Stop>) {
        self.inner.count_bytes(self.transport, received.bytes);
        self.inner.count_refused(self.transport, received.refused.into());
        self.late(received);
        self.inner.count_handoff(label(outcome));
        self.total(|totals| totals.handoff_bytes += received.bytes);
        if received.blocks > 0 && matches!(outcome, Ok(Outcome::Complete(_))) {
            self.inner.handoff_seconds.observe(received.elapsed.as_secs_f64());
            self.total(|totals| {
                totals.handoffs += 1;
                totals.handoff_us += received.elapsed.as_micros() as u64;
            });
        }
    }

    /// Blocks that took longer to land than they may, and those of which nobody will ever know.
    pub fn late(&self, received: &Received) {
        self.inner.count_overdue(self.transport, received.overdue.into());
        self.inner.count_lost(self.transport, received.lost.into());
    }
}

fn label(outcome: &Result<Outcome, Stop>) -> &'static str {
    match outcome {
        Ok(Outcome::Complete(_)) => "complete",
        Ok(Outcome::Finished(_)) => "finished",
        Ok(Outcome::Expired) => "expired",
        Err(Stop::Gone) => "cancelled",
        Err(Stop::Failed(error)) if error.code() == ErrorCode::Draining => "cancelled",
        Ok(Outcome::Stalled | Outcome::Severed) | Err(Stop::Failed(_)) => "failed",
    }
}
