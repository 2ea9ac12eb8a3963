//! What the router counts, in the names of the metrics that users rely on.

use crate::Shared;
use proto::Role;
use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use telemetry::{Gauges, Labels, Registry, router};

pub struct Metrics {
    families: router::Metrics,
    /// Label sets that a gauge has shown; it shows 0 when they are gone.
    shown: Mutex<BTreeSet<Labels>>,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        Metrics { families: router::Metrics::new(registry), shown: Mutex::default() }
    }

    /// `rejected` by the queue, `refused` by a full worker, `failed` on a worker, `placed`.
    pub fn placement(&self, outcome: &'static str) {
        self.families.count_placement(outcome);
    }

    pub fn placed(&self, waited: Duration) {
        self.placement("placed");
        self.families.queue_seconds.observe(waited.as_secs_f64());
    }

    pub fn migration(&self, cause: &'static str) {
        self.families.count_migration(cause);
    }

    /// A worker said what it must not say: a token lost, repeated or contradicted.
    pub fn violation(&self) {
        self.families.token_order_violations.inc();
    }

    /// By cause.
    pub fn migrations(&self) -> [(&'static str, u64); 4] {
        router::CAUSES.map(|cause| (cause, self.families.migrated(cause)))
    }

    /// By outcome.
    pub fn placements(&self) -> [(&'static str, u64); 4] {
        router::OUTCOMES.map(|outcome| (outcome, self.families.placed(outcome)))
    }

    /// Sets the gauges to what is now.
    pub fn observe(&self, shared: &Shared) {
        let depths = shared.admission.depths().into_iter().map(|(priority, depth)| (class(priority), depth));
        self.set(&self.families.queue_depth, "class", depths.collect());
        let census = shared.cluster.census().into_iter();
        let census = census.map(|((member, state), count)| (role(member, state), count));
        let roles = [Role::Prefill, Role::Decode, Role::Both];
        let desired = |of| shared.config.pools.desired(of).map(|count| (role(of, "desired"), count));
        let desired = roles.into_iter().filter_map(desired);
        // A router that sees nobody says so: beside others that do, a series that is absent would look like agreement.
        let nobody = roles.into_iter().map(|of| (role(of, "ready"), 0));
        self.set(&self.families.members, "role", nobody.chain(census).chain(desired).collect());
        self.families.running.set(i64::try_from(shared.admission.running()).unwrap_or(i64::MAX));
    }

    /// Sets one gauge, all of whose label sets begin with the label `first`.
    fn set(&self, gauge: &Gauges, first: &str, now: Vec<(Labels, u32)>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        for labels in shown.iter().filter(|labels| labels[0].0 == first) {
            gauge.get_or_create(labels).set(0);
        }
        for (labels, count) in now {
            gauge.get_or_create(&labels).inc_by(count.into());
            shown.insert(labels);
        }
    }
}

/// Priorities are the clients' own: beyond these they share a label, so that labels stay few.
const CLASSES: i32 = 8;

fn class(priority: i32) -> Labels {
    vec![("class", priority.clamp(-CLASSES, CLASSES).to_string())]
}

fn role(role: Role, state: &str) -> Labels {
    let role = match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
        Role::Unspecified => "unspecified",
    };
    vec![("role", role.into()), ("state", state.into())]
}
