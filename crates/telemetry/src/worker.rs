//! Metrics of a worker.

use crate::{Buckets, Counters, Gauges, Histograms, Registry, histograms};
use prometheus_client::metrics::{gauge::Gauge, histogram::Histogram};
use std::time::Duration;

#[derive(Clone)]
pub struct Metrics {
    /// By role and state (free, cached, held, quarantined).
    pub kv_blocks: Gauges,
    /// By transport. Counted where bytes land, so that a sum over workers counts each once.
    pub handoff_bytes: Counters,
    /// Blocks refused on arrival, by transport: not the bytes that their digest names.
    pub handoff_refused: Counters,
    /// Blocks that had not landed in time, by transport.
    pub handoff_overdue: Counters,
    /// Blocks quarantined for good, by transport.
    pub handoff_lost: Counters,
    /// From first offer to last accept.
    pub handoff_seconds: Histogram,
    /// By outcome.
    pub handoffs: Counters,
    /// By kind (prefill, decode, mixed).
    pub step_seconds: Histograms,
    pub batch_tokens: Histograms,
    pub running: Gauge,
    pub waiting: Gauge,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Metrics {
            kv_blocks: Gauges::default(),
            handoff_bytes: Counters::default(),
            handoff_refused: Counters::default(),
            handoff_overdue: Counters::default(),
            handoff_lost: Counters::default(),
            handoff_seconds: Buckets::REQUEST.histogram(),
            handoffs: Counters::default(),
            step_seconds: histograms(Buckets::STEP),
            batch_tokens: histograms(Buckets::TOKENS),
            running: Gauge::default(),
            waiting: Gauge::default(),
        };
        metrics.register(registry);
        metrics
    }

    pub fn set_blocks(&self, role: &str, state: &str, blocks: u32) {
        let labels = vec![("role", role.to_owned()), ("state", state.to_owned())];
        self.kv_blocks.get_or_create(&labels).set(i64::from(blocks));
    }

    pub fn count_bytes(&self, transport: &str, bytes: u64) {
        self.handoff_bytes.get_or_create(&vec![("transport", transport.to_owned())]).inc_by(bytes);
    }

    pub fn count_refused(&self, transport: &str, blocks: u64) {
        self.handoff_refused.get_or_create(&vec![("transport", transport.to_owned())]).inc_by(blocks);
    }

    pub fn count_overdue(&self, transport: &str, blocks: u64) {
        self.handoff_overdue.get_or_create(&vec![("transport", transport.to_owned())]).inc_by(blocks);
    }

    pub fn count_lost(&self, transport: &str, blocks: u64) {
        self.handoff_lost.get_or_create(&vec![("transport", transport.to_owned())]).inc_by(blocks);
    }

    pub fn count_handoff(&self, outcome: &str) {
        self.handoffs.get_or_create(&vec![("outcome", outcome.to_owned())]).inc();
    }

    pub fn observe_step(&self, kind: &str, tokens: usize, elapsed: Duration) {
        let labels = vec![("kind", kind.to_owned())];
        self.step_seconds.get_or_create(&labels).observe(elapsed.as_secs_f64());
        self.batch_tokens.get_or_create(&labels).observe(tokens as f64);
    }

    fn register(&self, registry: &mut Registry) {
        let m = self.clone();
        registry.register("baton_kv_blocks", "Blocks of the KV cache, by role and state", m.kv_blocks);
        registry.register("baton_handoff_bytes", "KV bytes handed over, by transport", m.handoff_bytes);
        registry.register(
            "baton_handoff_blocks_refused",
            "Blocks refused on arrival, their bytes not being those that left, by transport",
            m.handoff_refused,
        );
        registry.register(
            "baton_handoff_blocks_overdue",
            "Blocks whose bytes had not landed in time, by transport",
            m.handoff_overdue,
        );
        registry.register(
            "baton_handoff_blocks_lost",
            "Blocks quarantined as long as the worker lives, for a read into them may never have ended, by transport",
            m.handoff_lost,
        );
        registry.register("baton_handoff_seconds", "From first offer to last accept", m.handoff_seconds);
        registry.register("baton_handoffs", "Hand-offs ended, by outcome", m.handoffs);
        registry.register("baton_step_seconds", "One forward pass, by kind of batch", m.step_seconds);
        registry.register(
            "baton_batch_tokens",
            "Tokens of one forward pass, by kind of batch",
            m.batch_tokens,
        );
        registry.register("baton_worker_running", "Sequences in the batch", m.running);
        registry.register("baton_worker_waiting", "Sequences waiting for the batch", m.waiting);
    }
}
