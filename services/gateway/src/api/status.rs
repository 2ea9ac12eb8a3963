//! `GET /status`: the cluster as a router sees it, as JSON, for `baton status` and dashboards.

use super::reply;
use crate::gateway::Gateway;
use axum::extract::State;
use axum::response::Response;
use proto::{Load, Member, Role, StatusReply};
use serde_json::{Value, json};
use std::sync::Arc;

pub async fn status(State(gateway): State<Arc<Gateway>>) -> Response {
    match gateway.upstream.status().await {
        Ok(status) => reply::json(&cluster(&status)),
        Err(error) => reply::error(&gateway.overloaded(&error.message)),
    }
}

fn cluster(status: &StatusReply) -> Value {
    let depths = status.queue.iter().map(|class| json!({"priority": class.priority, "depth": class.depth}));
    json!({
        "members": status.members.iter().map(member).collect::<Vec<_>>(),
        "queue": depths.collect::<Vec<_>>(),
        "running": status.running,
        "queue_limit": status.queue_limit,
    })
}

/// Fingerprints are hexadecimal text: as JSON numbers they would lose digits.
fn member(member: &Member) -> Value {
    json!({
        "id": member.id,
        "role": role(member.role()),
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
    })
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
        Role::Unspecified => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_told_whole() {
        let load = Load { blocks_total: 9, blocks_free: 4, ..Load::default() };
        let prefill = Member {
            role: Role::Prefill as i32,
            weights_fingerprint: u64::MAX,
            load: Some(load),
            ..Member::default()
        };
        let told = cluster(&StatusReply { members: vec![prefill], running: 2, ..StatusReply::default() });
        let member = &told["members"][0];
        assert_eq!((&member["role"], &member["weights"]), (&json!("prefill"), &json!("ffffffffffffffff")));
        assert_eq!((&member["load"]["blocks_total"], &told["running"]), (&json!(9), &json!(2)));
    }
}
