//! `POST /drain` on the admin port: tells this worker to leave the cluster, as SIGTERM does.

use axum::{Json, Router, http::StatusCode, routing::post};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

pub fn router(asked: CancellationToken) -> Router {
    let leave = move || async move {
        tracing::info!("asked to leave");
        asked.cancel();
        (StatusCode::ACCEPTED, Json(reply()))
    };
    Router::new().route("/drain", post(leave))
}

fn reply() -> Value {
    json!({ "pid": std::process::id(), "draining": true })
}
