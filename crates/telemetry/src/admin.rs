//! The admin port: `/health` (the process lives), `/ready` (it would serve), `/metrics` (Prometheus
//! text), and whatever routes a service adds.

use crate::Registry;
use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
    serve::Listener,
};
use prometheus_client::encoding::text::encode;
use std::{fmt, future::Future, io, sync::Arc};
use tokio::sync::watch;

/// Whether a service would serve now, and if not, why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    pub ready: bool,
    pub reason: String,
}

impl Readiness {
    pub fn ready() -> Self {
        Readiness { ready: true, reason: String::new() }
    }

    pub fn not(reason: impl Into<String>) -> Self {
        Readiness { ready: false, reason: reason.into() }
    }
}

/// Serves the admin port until `shutdown`.
pub async fn serve<L: Listener<Addr: fmt::Debug>>(
    listener: L,
    registry: Registry,
    ready: watch::Receiver<Readiness>,
    extra: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let app = routes(Arc::new(registry), ready).merge(extra);
    axum::serve(listener, app).with_graceful_shutdown(shutdown).await
}

/// The three routes alone, for a service that also shows them elsewhere.
pub fn routes(registry: Arc<Registry>, ready: watch::Receiver<Readiness>) -> Router {
    Router::new()
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(move || async move { readiness(&ready.borrow()) }))
        .route("/metrics", get(move || async move { metrics(&registry) }))
}

fn readiness(state: &Readiness) -> (StatusCode, String) {
    match state.ready {
        true => (StatusCode::OK, "ready\n".to_owned()),
        false => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", state.reason)),
    }
}

fn metrics(registry: &Registry) -> impl IntoResponse + use<> {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_come_out_under_their_contracted_names() {
        let mut registry = Registry::default();
        crate::gateway::Metrics::new(&mut registry).count("/v1/completions", 200);
        crate::router::Metrics::new(&mut registry).count_migration("preempted");
        let worker = crate::worker::Metrics::new(&mut registry);
        worker.set_blocks("decode", "free", 3);
        worker.count_bytes("grpc", 7);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            r#"baton_gateway_requests_total{endpoint="/v1/completions",code="200"} 1"#,
            r#"baton_migrations_total{cause="preempted"} 1"#,
            r#"baton_migrations_total{cause="decode_lost"} 0"#,
            r#"baton_router_queue_depth{class="0"} 0"#,
            r#"baton_kv_blocks{role="decode",state="free"} 3"#,
            r#"baton_handoff_bytes_total{transport="grpc"} 7"#,
            "baton_prompt_tokens_total 0",
            "baton_time_to_first_token_seconds_count 0",
        ] {
            assert!(text.contains(line), "{line} is missing from\n{text}");
        }
    }
}
