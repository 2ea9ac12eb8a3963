//! `GET /debug/pool`: what the pool holds and whether its books are right, so that a test can assert that an
//! idle worker leaks nothing.

use crate::shared::Shared;
use axum::{Json, Router, extract::State, routing::get};
use kv::Counts;
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::watch;

/// Empty until the engine runs.
pub type Current = watch::Receiver<Option<Arc<Shared>>>;

pub fn router(current: Current) -> Router {
    Router::new().route("/debug/pool", get(pool)).with_state(current)
}

async fn pool(State(current): State<Current>) -> Json<Value> {
    let shared = current.borrow().clone();
    match shared {
        Some(shared) => Json(report(&shared).await),
        None => Json(json!({ "pid": std::process::id(), "check": "the engine has not started" })),
    }
}

async fn report(shared: &Shared) -> Value {
    let checked = shared.engine.check_pool().await;
    let load = shared.load();
    let (check, blocks) = match checked {
        Ok(counts) => ("ok".to_owned(), counts),
        Err(violation) => (violation, load.blocks),
    };
    json!({
        "pid": std::process::id(),
        "id": shared.id,
        "role": shared.role().name(),
        "check": check,
        "blocks": counts(blocks),
        "running": load.running,
        "waiting": load.waiting,
        "reserved": load.reserved,
        "reservations": shared.reservations.len(),
        "step": load.step,
    })
}

fn counts(counts: Counts) -> Value {
    json!({
        "total": counts.total,
        "free": counts.free,
        "cached": counts.cached,
        "held": counts.held,
        "quarantined": counts.quarantined,
    })
}
