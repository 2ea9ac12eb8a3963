//! This worker's presence in the cluster: its record, its load as it changes, its leaving.

use crate::shared::Shared;
use engine::EngineLoad;
use membership::Registration;
use proto::{Load, Member, Totals};
use std::time::Duration;
use tokio::time::MissedTickBehavior;

/// Pace at which a changed load is told.
const UPDATE: Duration = Duration::from_millis(200);

pub struct Addresses {
    pub grpc: String,
    pub admin: String,
}

pub fn record(shared: &Shared, addresses: &Addresses, model: &str) -> Member {
    let config = &shared.config;
    Member {
        id: shared.id.clone(),
        role: role(config.role) as i32,
        address: addresses.grpc.clone(),
        admin_address: addresses.admin.clone(),
        model: model.to_owned(),
        weights_fingerprint: shared.weights_fingerprint,
        layout_fingerprint: shared.layout_fingerprint,
        block_tokens: config.block_tokens,
        max_context: shared.bounds.max_context,
        draining: false,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        load: Some(load(shared.load(), shared.metrics.totals())),
        pid: std::process::id(),
        max_sequences: config.max_sequences,
        backend: config.backend.clone(),
        files_fingerprint: shared.files_fingerprint,
    }
}

fn role(role: crate::Role) -> proto::Role {
    match role {
        crate::Role::Prefill => proto::Role::Prefill,
        crate::Role::Decode => proto::Role::Decode,
        crate::Role::Both => proto::Role::Both,
    }
}

fn load(load: EngineLoad, totals: Totals) -> Load {
    let blocks = load.blocks;
    Load {
        blocks_total: blocks.total,
        blocks_free: blocks.free + blocks.cached,
        running: load.running,
        waiting: load.waiting,
        reserved: load.reserved,
        waiting_tokens: load.waiting_tokens,
        step: load.step,
        blocks_cached: blocks.cached,
        blocks_quarantined: blocks.quarantined,
        totals: Some(totals),
    }
}

/// Tells every change of the load, at most one in each [`UPDATE`]. Never ends by itself.
pub async fn tell_load(registration: &Registration, shared: &Shared) {
    let mut loads = shared.loads();
    let mut pace = tokio::time::interval(UPDATE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        if loads.changed().await.is_err() {
            // The engine has ended, which others watch for.
            return std::future::pending().await;
        }
        let now = *loads.borrow_and_update();
        shared.metrics.loaded(&now);
        let totals = shared.metrics.totals();
        registration.update(|member| member.load = Some(load(now, totals)));
    }
}
