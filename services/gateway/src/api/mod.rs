//! The HTTP surface: routes, and what every answer carries.

mod access;
mod body;
mod chat;
mod completions;
mod dashboard;
mod drain;
mod head;
mod identity;
mod logprobs;
mod models;
pub mod reply;
mod serve;
mod shape;
mod status;
mod stream;
mod trace;

use crate::gateway::Gateway;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use openai::{Code, Error};
use std::sync::Arc;
use telemetry::Registry;

/// The OpenAI API, with health, readiness and metrics beside it.
pub fn public(gateway: Arc<Gateway>, registry: Arc<Registry>) -> Router {
    let page = if gateway.config.dashboard { dashboard::routes() } else { Router::new() };
    page.route("/v1/chat/completions", post(serve::serve::<chat::Chat>))
        .route("/v1/completions", post(serve::serve::<completions::Completions>))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .with_state(gateway.clone())
        .merge(admin(gateway.clone(), registry))
        .fallback(unknown_url)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(gateway.clone(), access::check))
        .layer(middleware::from_fn_with_state(gateway, head::check))
        .layer(middleware::from_fn(identity::identify))
}

/// Health, readiness, metrics, the cluster's status with orders to its workers, and the records of requests; whoever asks for readiness gets it fresh.
pub fn admin(gateway: Arc<Gateway>, registry: Arc<Registry>) -> Router {
    let status = Router::new()
        .route("/status", get(status::status))
        .route("/status/members/{id}/drain", post(drain::drain))
        .route("/trace/{*id}", get(trace::trace))
        .route("/status/history", get(status::history))
        .with_state(gateway.clone());
    telemetry::admin::routes(registry, gateway.readiness())
        .merge(status)
        .layer(middleware::from_fn_with_state(gateway, look_first))
}

async fn look_first(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    if request.uri().path() == "/ready" {
        gateway.look_first().await;
    }
    next.run(request).await
}

async fn unknown_url(method: Method, uri: Uri) -> Response {
    let path = openai::shorten(uri.path());
    reply::error(&Error::new(
        Code::UnknownUrl,
        format!(
            "Unknown request URL: {method} {path}. Served are /v1/chat/completions, /v1/completions and /v1/models"
        ),
    ))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let path = openai::shorten(uri.path());
    reply::error(&Error::new(Code::MethodNotAllowed, format!("{method} is not allowed on {path}")))
}
