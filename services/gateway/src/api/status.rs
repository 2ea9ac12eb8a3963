//! `GET /status`: the cluster as the routers see it, as JSON, for `baton status` and the dashboard; and
//! `GET /status/history`: the last fifteen minutes of it.

use super::reply;
use crate::cluster::{Seen, role};
use crate::gateway::Gateway;
use crate::history::{FIELDS, INTERVAL};
use crate::problems::problems;
use axum::extract::{Query, State};
use axum::response::Response;
use proto::{Load, LostMember, Member, Pool, Source, StatusReply, Totals};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

pub async fn status(State(gateway): State<Arc<Gateway>>) -> Response {
    match gateway.looks.fresh().await {
        Ok(seen) => {
            let problems = problems(&seen, &gateway.config.worker_model);
            let mut told = cluster(&seen);
            told["problems"] = json!(problems);
            told["version"] = json!(env!("CARGO_PKG_VERSION"));
            reply::json(&told)
        }
        Err(error) => reply::error(&gateway.overloaded(&error.message)),
    }
}

#[derive(Deserialize)]
pub struct Asked {
    /// Milliseconds since the epoch; only later samples are told.
    #[serde(default)]
    since: u64,
}

pub async fn history(State(gateway): State<Arc<Gateway>>, Query(asked): Query<Asked>) -> Response {
    reply::json(&json!({
        "interval_ms": INTERVAL.as_millis() as u64,
        "fields": FIELDS,
        "samples": gateway.history().since(asked.since),
    }))
}

fn cluster(seen: &Seen) -> Value {
    let status = &seen.status;
    let depths = status.queue.iter().map(|class| json!({"priority": class.priority, "depth": class.depth}));
    let members = status.members.iter().zip(conditions(status));
    let answering = seen.routers.iter().map(|(address, _)| json!({"address": address, "answers": true}));
    let silent = seen.silent.iter();
    let silent = silent.map(|(address, why)| json!({"address": address, "answers": false, "problem": why}));
    json!({
        "pools": status.pools.iter().map(pool).collect::<Vec<_>>(),
        "members": members.map(|(member, state)| told(member, state)).collect::<Vec<_>>(),
        "lost": status.lost.iter().filter_map(lost).collect::<Vec<_>>(),
        "queue": depths.collect::<Vec<_>>(),
        "running": status.running,
        "queue_limit": status.queue_limit,
        "migrations": status.migrations,
        "placements": status.placements,
        "routers": answering.chain(silent).collect::<Vec<_>>(),
        "source": status.source.as_ref().map(source),
    })
}

/// Of the members, in their order. A router that does not tell them yet still tells who drains.
fn conditions(status: &StatusReply) -> Vec<&str> {
    let told = status.conditions.iter().map(String::as_str);
    match status.conditions.len() == status.members.len() {
        true => told.collect(),
        false => {
            status.members.iter().map(|member| if member.draining { "draining" } else { "ready" }).collect()
        }
    }
}

fn pool(pool: &Pool) -> Value {
    json!({
        "role": role(pool.role()),
        "desired": pool.desired,
        "ready": pool.ready,
        "draining": pool.draining,
    })
}

fn lost(lost: &LostMember) -> Option<Value> {
    let mut value = told(lost.member.as_ref()?, "missing");
    value["lost_ms"] = json!(lost.lost_ms);
    Some(value)
}

fn source(source: &Source) -> Value {
    json!({"kind": source.kind, "connected": source.connected, "stale_ms": source.stale_ms})
}

/// Fingerprints are hexadecimal text: as JSON numbers they would lose digits.
fn told(member: &Member, state: &str) -> Value {
    json!({
        "id": member.id,
        "role": role(member.role()),
        "state": state,
        "draining": member.draining,
        "address": member.address,
        "admin": member.admin_address,
        "pid": member.pid,
        "model": member.model,
        "backend": member.backend,
        "version": member.version,
        "weights": format!("{:016x}", member.weights_fingerprint),
        "files": format!("{:016x}", member.files_fingerprint),
        "layout": format!("{:016x}", member.layout_fingerprint),
        "block_tokens": member.block_tokens,
        "max_context": member.max_context,
        "max_sequences": member.max_sequences,
        "load": member.load.as_ref().map(load),
    })
}

fn load(load: &Load) -> Value {
    json!({
        "running": load.running,
        "waiting": load.waiting,
        "waiting_tokens": load.waiting_tokens,
        "reserved": load.reserved,
        "step": load.step,
        "blocks_total": load.blocks_total,
        "blocks_free": load.blocks_free,
        "blocks_cached": load.blocks_cached,
        "blocks_quarantined": load.blocks_quarantined,
        "totals": load.totals.as_ref().map(totals),
    })
}

fn totals(totals: &Totals) -> Value {
    json!({
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "handoffs": totals.handoffs,
        "handoff_bytes": totals.handoff_bytes,
        "handoff_us": totals.handoff_us,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Role;

    #[test]
    fn members_and_the_lost_are_told_whole() {
        let load = Load { blocks_total: 9, blocks_free: 4, ..Load::default() };
        let prefill = Member {
            role: Role::Prefill as i32,
            weights_fingerprint: u64::MAX,
            load: Some(load),
            ..Member::default()
        };
        let lost = LostMember { member: Some(prefill.clone()), lost_ms: 5 };
        let pools = vec![Pool { role: Role::Prefill as i32, desired: Some(2), ready: 1, draining: 0 }];
        let status = StatusReply {
            members: vec![prefill],
            lost: vec![lost],
            pools,
            running: 2,
            ..StatusReply::default()
        };
        let told = cluster(&Seen { status, routers: Vec::new(), silent: vec![("r".into(), "gone".into())] });
        let member = &told["members"][0];
        assert_eq!((&member["role"], &member["weights"]), (&json!("prefill"), &json!("ffffffffffffffff")));
        assert_eq!((&member["load"]["blocks_total"], &told["running"]), (&json!(9), &json!(2)));
        assert_eq!((&member["state"], &told["lost"][0]["state"]), (&json!("ready"), &json!("missing")));
        assert_eq!(told["pools"][0]["desired"], json!(2));
        assert_eq!(told["routers"][0]["problem"], json!("gone"));
    }
}
