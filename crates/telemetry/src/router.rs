//! Metrics of the router.

use crate::{Buckets, Counters, Gauges, Registry};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

/// Why a sequence moves to other workers.
pub const CAUSES: [&str; 4] = ["preempted", "prefill_lost", "decode_lost", "drained"];

/// What became of the try to place a request.
pub const OUTCOMES: [&str; 4] = ["placed", "refused", "rejected", "failed"];

#[derive(Clone)]
pub struct Metrics {
    /// Requests waiting, by priority class.
    pub queue_depth: Gauges,
    pub queue_seconds: Histogram,
    /// By outcome.
    pub placements: Counters,
    /// By cause.
    pub migrations: Counters,
    /// By role and state (ready, draining, starting, suspected; desired: how many there should be).
    pub members: Gauges,
    pub running: Gauge,
    /// Tokens that arrived out of order or twice: always 0 in a sound cluster.
    pub token_order_violations: Counter,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Metrics {
            queue_depth: Gauges::default(),
            queue_seconds: Buckets::REQUEST.histogram(),
            placements: Counters::default(),
            migrations: Counters::default(),
            members: Gauges::default(),
            running: Gauge::default(),
            token_order_violations: Counter::default(),
        };
        metrics.register(registry);
        metrics.zero();
        metrics
    }

    pub fn count_placement(&self, outcome: &str) {
        self.placements.get_or_create(&vec![("outcome", outcome.to_owned())]).inc();
    }

    pub fn count_migration(&self, cause: &str) {
        self.migrations.get_or_create(&vec![("cause", cause.to_owned())]).inc();
    }

    pub fn migrated(&self, cause: &str) -> u64 {
        self.migrations.get_or_create(&vec![("cause", cause.to_owned())]).get()
    }

    pub fn placed(&self, outcome: &str) -> u64 {
        self.placements.get_or_create(&vec![("outcome", outcome.to_owned())]).get()
    }

    /// What has not happened yet is 0, and not absent: dashboards and alerts need a beginning.
    fn zero(&self) {
        self.queue_depth.get_or_create(&vec![("class", "0".to_owned())]).set(0);
        for cause in CAUSES {
            drop(self.migrations.get_or_create(&vec![("cause", cause.to_owned())]));
        }
    }

    fn register(&self, registry: &mut Registry) {
        let m = self.clone();
        registry.register("baton_router_queue_depth", "Requests waiting, by priority class", m.queue_depth);
        registry.register("baton_router_queue_seconds", "From arrival to placement", m.queue_seconds);
        registry.register("baton_router_placements", "Placements tried, by outcome", m.placements);
        registry.register("baton_migrations", "Sequences continued elsewhere, by cause", m.migrations);
        registry.register(
            "baton_members",
            "Members by role and state; desired: how many there should be",
            m.members,
        );
        registry.register("baton_router_running", "Requests placed and not ended", m.running);
        registry.register(
            "baton_router_token_order_violations",
            "Tokens refused because they came twice or out of order",
            m.token_order_violations,
        );
    }
}
