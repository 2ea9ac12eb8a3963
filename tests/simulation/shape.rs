//! What a seed makes of a cluster: how many of each service, how large their pools, how patient they are.

use crate::{
    cluster::{MODEL, model},
    nature::Chance,
};
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Shape {
    pub seed: u64,
    pub prefills: u64,
    pub decodes: u64,
    pub boths: u64,
    pub routers: u64,
    /// Of each worker's pool.
    pub blocks: u32,
    pub block_tokens: u32,
    /// Tokens of one step.
    pub chunk: u32,
    pub sequences: u32,
    /// One in so many blocks is damaged on its way; 0: none.
    pub damage: u64,
    /// The router serves the membership, instead of a source of its own.
    pub registry: bool,
    /// How late views of the membership are.
    pub lag: Duration,
    /// Requests that may wait in a router's queue.
    pub queue: usize,
}

impl Shape {
    /// Disturbed by what the seed says.
    pub fn of(seed: u64) -> Self {
        let mut chance = Chance::new(seed, "shape");
        let registry = chance.once_in(4);
        Shape {
            seed,
            registry,
            prefills: chance.within(1, 4),
            decodes: chance.within(1, 4),
            boths: u64::from(chance.once_in(4)),
            routers: if registry { 1 } else { *chance.of(&[1, 1, 2]) },
            blocks: *chance.of(&[24, 32, 48, 256, 256, 1024]),
            block_tokens: *chance.of(&[4, 8, 16]),
            chunk: *chance.of(&[16, 32, 64]),
            sequences: *chance.of(&[4, 8, 16]),
            damage: *chance.of(&[0, 0, 20, 100]),
            lag: Duration::from_millis(*chance.of(&[1, 20, 200])),
            queue: *chance.of(&[8, 64, 64]),
        }
    }

    /// One worker with room for everything: what it answers is right.
    pub fn undisturbed(seed: u64) -> Self {
        Shape {
            seed,
            prefills: 0,
            decodes: 0,
            boths: 1,
            routers: 1,
            blocks: 8192,
            block_tokens: 16,
            chunk: 512,
            sequences: 64,
            damage: 0,
            registry: false,
            lag: Duration::from_millis(1),
            queue: 1024,
        }
    }

    /// Whether nobody need be refused or preempted for want of room.
    pub fn is_roomy(&self) -> bool {
        self.blocks >= 256 && self.queue >= 64
    }

    /// Of all hosts, routers first.
    pub fn names(&self) -> Vec<String> {
        let many = |role: &'static str, count: u64| (0..count).map(move |at| format!("{role}-{at}"));
        let workers = many("prefill", self.prefills)
            .chain(many("decode", self.decodes))
            .chain(many("both", self.boths));
        many("router", self.routers).chain(workers).chain(["gateway".to_owned()]).collect()
    }

    /// Tokens that one sequence may have on such workers.
    pub fn context(&self) -> u32 {
        (self.blocks * self.block_tokens).min(2048)
    }

    pub fn lease(&self) -> Duration {
        Duration::from_secs(2)
    }

    pub fn gateway(&self) -> gateway::Config {
        gateway::Config {
            routers: (0..self.routers).map(|at| format!("http://router-{at}:7000")).collect(),
            model_dir: model(),
            served_model_name: vec![MODEL.to_owned()],
            timeouts: gateway::Timeouts {
                request_ms: 60_000,
                connect_ms: 500,
                silence_ms: 2_000,
                stalled_client_ms: 4_000,
                ..gateway::Timeouts::default()
            },
            ..gateway::Config::default()
        }
    }

    pub fn router(&self) -> router::Config {
        router::Config {
            lease_ms: 2_000,
            drain_ms: 2_000,
            running: 64,
            queue: router::Queue { limit: self.queue, timeout_ms: 15_000, ageing_ms: 2_000 },
            prefill: router::Prefill { tokens: 256, requests: 4 },
            liveness: router::Liveness {
                heartbeat_ms: 200,
                silence_ms: 2_000,
                connect_ms: 500,
                stalled_client_ms: 4_000,
            },
            members: router::Members { connections: 1, ..router::Members::default() },
            ..router::Config::default()
        }
    }

    pub fn worker(&self, role: &str) -> worker::Config {
        worker::Config {
            role: match role {
                "prefill" => worker::Role::Prefill,
                "decode" => worker::Role::Decode,
                _ => worker::Role::Both,
            },
            backend: "sim".into(),
            model: model(),
            served_model_name: Some(MODEL.to_owned()),
            block_tokens: self.block_tokens,
            kv_blocks: Some(self.blocks),
            max_sequences: self.sequences,
            max_step_tokens: self.chunk,
            waiting: 32,
            liveness: worker::Liveness {
                heartbeat_ms: 200,
                silence_ms: 2_000,
                reservation_ms: 4_000,
                stalled_ms: 4_000,
                ..worker::Liveness::default()
            },
            handoff: worker::Handoff { window_kb: 1, tries: 5, ..worker::Handoff::default() },
            drain_ms: 2_000,
            ..worker::Config::default()
        }
    }
}
