//! Metrics of credentials: files of keys and certificates that are read again when they change, and connections refused.

use crate::{Counters, Gauges, Registry};

#[derive(Clone)]
pub struct Metrics {
    /// By what they hold, and outcome (taken, refused).
    reloads: Counters,
    /// By what they hold: 1 while the files are not what is in use.
    stale: Gauges,
}

impl Metrics {
    /// `what`: which files, for the first sample.
    pub fn new(registry: &mut Registry, what: &'static str) -> Self {
        let metrics = Metrics { reloads: Counters::default(), stale: Gauges::default() };
        registry.register(
            "baton_credentials_reloads",
            "Changes of the files of keys or certificates, by outcome",
            metrics.reloads.clone(),
        );
        registry.register(
            "baton_credentials_stale",
            "1 while the files of keys or certificates cannot be used and those before them are",
            metrics.stale.clone(),
        );
        metrics.watch(what);
        metrics
    }

    /// What has not happened yet is 0, and not absent.
    pub fn watch(&self, what: &'static str) {
        self.readable(what);
        for outcome in ["taken", "refused"] {
            drop(self.reloads.get_or_create(&labels(what, outcome)));
        }
    }

    pub fn taken(&self, what: &'static str) {
        self.reloads.get_or_create(&labels(what, "taken")).inc();
        self.readable(what);
    }

    pub fn refused(&self, what: &'static str) {
        self.reloads.get_or_create(&labels(what, "refused")).inc();
        self.stale.get_or_create(&vec![("what", what.to_owned())]).set(1);
    }

    pub fn readable(&self, what: &'static str) {
        self.stale.get_or_create(&vec![("what", what.to_owned())]).set(0);
    }

    pub fn is_stale(&self, what: &'static str) -> bool {
        self.stale.get_or_create(&vec![("what", what.to_owned())]).get() != 0
    }
}

fn labels(what: &str, outcome: &str) -> crate::Labels {
    vec![("what", what.to_owned()), ("outcome", outcome.to_owned())]
}
