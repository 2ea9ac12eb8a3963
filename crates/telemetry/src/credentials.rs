//! Metrics of credentials: files of keys and certificates that are read again when they change, and connections refused.

use crate::{Counters, Gauges, Registry};
use prometheus_client::metrics::counter::Counter;

#[derive(Clone, Default)]
pub struct Metrics {
    /// By what they hold, and outcome (taken, refused).
    reloads: Counters,
    /// By what they hold: 1 while the files are not what is in use.
    stale: Gauges,
    /// Connections whose other side did not show who it is.
    refused: Counter,
}

impl Metrics {
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "baton_credentials_reloads",
            "Changes of the files of keys or certificates, by outcome",
            self.reloads.clone(),
        );
        registry.register(
            "baton_credentials_stale",
            "1 while the files of keys or certificates cannot be used and those before them are",
            self.stale.clone(),
        );
        registry.register(
            "baton_tls_connections_refused",
            "Connections refused because they were not secured, or their certificate is not one of ours",
            self.refused.clone(),
        );
    }

    pub fn connection_refused(&self) {
        self.refused.inc();
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

    /// Changes so far that ended so.
    pub fn reloads(&self, what: &str, outcome: &str) -> u64 {
        self.reloads.get_or_create(&labels(what, outcome)).get()
    }

    pub fn connections_refused(&self) -> u64 {
        self.refused.get()
    }

    pub fn is_stale(&self, what: &'static str) -> bool {
        self.stale.get_or_create(&vec![("what", what.to_owned())]).get() != 0
    }
}

fn labels(what: &str, outcome: &str) -> crate::Labels {
    vec![("what", what.to_owned()), ("outcome", outcome.to_owned())]
}
