//! The router's configuration: one TOML file, read once at start. Durations are milliseconds.

use credentials::TlsConfig;
use membership::EtcdTls;
use proto::Role;
use serde::Deserialize;
use std::{net::SocketAddr, time::Duration};
use telemetry::Traces;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// gRPC: `Router`, and `Registry` when `etcd` is empty.
    pub listen: SocketAddr,
    /// Health, readiness and metrics over HTTP.
    pub admin: SocketAddr,
    /// Every endpoint of the etcd cluster that holds the membership; empty: the registry is served here.
    pub etcd: Vec<String>,
    /// For endpoints on https: PEM files `ca`, and `cert` and `key` if etcd asks for a client certificate.
    pub etcd_tls: Option<EtcdTls>,
    /// Secures the connections to gateways and workers, in both directions; all services must agree.
    pub tls: Option<TlsConfig>,
    /// Name of this cluster among others in the same etcd.
    pub prefix: String,
    /// Silence after which a member is gone.
    pub lease_ms: u64,
    /// After a signal to stop: how long running requests may go on.
    pub drain_ms: u64,
    /// Requests placed and not ended; further ones wait in the queue. At least 1.
    pub running: usize,
    /// Placements of one request that may fail before the client gets the error. At least 1.
    pub attempts: u32,
    pub queue: Queue,
    pub prefill: Prefill,
    pub liveness: Liveness,
    pub members: Members,
    pub traces: Traces,
    pub pools: Pools,
}

/// How many workers of each role there should be, as whoever starts them knows; absent: unknown. It changes
/// nothing but what is told: `/status`, `baton_members{state="desired"}`, the dashboard.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pools {
    pub prefill: Option<u32>,
    pub decode: Option<u32>,
    pub both: Option<u32>,
}

impl Pools {
    pub fn desired(&self, role: Role) -> Option<u32> {
        match role {
            Role::Prefill => self.prefill,
            Role::Decode => self.decode,
            Role::Both => self.both,
            Role::Unspecified => None,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Requests that may wait; the next one is refused with the predicted wait.
    pub limit: usize,
    /// Longest wait of a request that names none.
    pub timeout_ms: u64,
    /// Waiting this long raises a priority class by one level.
    pub ageing_ms: u64,
}

/// Credits: what a prefill member may owe before further requests wait in the queue, where they can
/// still be reordered.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prefill {
    /// Uncomputed prompt tokens; about twice a member's step budget keeps it busy. A single longer
    /// prompt is always admitted to an idle member.
    pub tokens: u64,
    /// Requests without their first token.
    pub requests: u32,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Liveness {
    /// Pace of the heartbeats to the gateway.
    pub heartbeat_ms: u64,
    /// A worker's stream silent for this long is lost; so is a worker with work whose step counter
    /// stands still for the longer of this and ten times the longest step seen.
    pub silence_ms: u64,
    /// For a connection to a worker.
    pub connect_ms: u64,
    /// A client that takes no event for this long is given up.
    pub stalled_client_ms: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Members {
    /// A member that failed gets no new placement until it has answered a probe; the pace of probes.
    pub probe_ms: u64,
    /// A request that failed on a member goes to another at once, but back to the same one, if there is no other,
    /// only after this long; twice as long after each further failure.
    pub retry_ms: u64,
    /// A member that refused for want of capacity is left alone for this long, unless its load changes before.
    pub refusal_ms: u64,
    /// Block hashes remembered per member, to find cached prefixes.
    pub prefix_blocks: usize,
    /// Connections per member; one HTTP/2 connection carries a limited number of streams.
    pub connections: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 7700)),
            admin: SocketAddr::from(([127, 0, 0, 1], 7701)),
            etcd: Vec::new(),
            etcd_tls: None,
            tls: None,
            prefix: "baton".into(),
            lease_ms: 5_000,
            drain_ms: 5_000,
            running: 1024,
            attempts: 5,
            queue: Queue::default(),
            prefill: Prefill::default(),
            liveness: Liveness::default(),
            members: Members::default(),
            traces: Traces::default(),
            pools: Pools::default(),
        }
    }
}

impl Default for Queue {
    fn default() -> Self {
        Queue { limit: 1024, timeout_ms: 60_000, ageing_ms: 10_000 }
    }
}

impl Default for Prefill {
    fn default() -> Self {
        Prefill { tokens: 8192, requests: 8 }
    }
}

impl Default for Liveness {
    fn default() -> Self {
        Liveness { heartbeat_ms: 1_000, silence_ms: 10_000, connect_ms: 2_000, stalled_client_ms: 60_000 }
    }
}

impl Default for Members {
    fn default() -> Self {
        Members { probe_ms: 500, retry_ms: 100, refusal_ms: 100, prefix_blocks: 65_536, connections: 4 }
    }
}

impl Config {
    /// Names the first setting that cannot work, and what it must be.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("running", self.running as u64),
            ("attempts", self.attempts.into()),
            ("lease_ms", self.lease_ms),
            ("queue.limit", self.queue.limit as u64),
            ("queue.timeout_ms", self.queue.timeout_ms),
            ("queue.ageing_ms", self.queue.ageing_ms),
            ("prefill.tokens", self.prefill.tokens),
            ("prefill.requests", self.prefill.requests.into()),
            ("liveness.heartbeat_ms", self.liveness.heartbeat_ms),
            ("liveness.silence_ms", self.liveness.silence_ms),
            ("liveness.connect_ms", self.liveness.connect_ms),
            ("liveness.stalled_client_ms", self.liveness.stalled_client_ms),
            ("members.probe_ms", self.members.probe_ms),
            ("members.connections", self.members.connections as u64),
        ];
        if self.etcd_tls.is_some() && self.etcd.is_empty() {
            return Err(
                "etcd_tls is set, but etcd is empty; list etcd's endpoints, or leave etcd_tls out".into()
            );
        }
        match positive.iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(format!("{name} is 0, but must be at least 1")),
            None => self.traces.check(),
        }
    }
}

pub(crate) fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<Config>("[queue]\nlimits = 3\n").unwrap_err();
        assert!(error.to_string().contains("limits"), "{error}");
    }

    #[test]
    fn zeroes_are_refused_by_name() {
        let config: Config = toml::from_str("[queue]\nlimit = 0\n").unwrap();
        assert!(config.check().unwrap_err().contains("queue.limit"));
        assert_eq!(Config::default().check(), Ok(()));
    }
}
