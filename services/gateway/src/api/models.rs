//! `GET /v1/models` and `/v1/models/{id}`; an id may contain slashes.

use super::reply;
use crate::gateway::Gateway;
use axum::extract::{Path, State};
use axum::response::Response;
use openai::{Model, ModelList};
use std::sync::Arc;

pub async fn list(State(gateway): State<Arc<Gateway>>) -> Response {
    gateway.metrics.count("/v1/models", 200);
    let data = gateway.names.iter().map(|name| model(&gateway, name)).collect();
    reply::json(&ModelList { object: "list", data })
}

pub async fn one(State(gateway): State<Arc<Gateway>>, Path(id): Path<String>) -> Response {
    match gateway.check_model(&id) {
        Ok(()) => {
            gateway.metrics.count("/v1/models", 200);
            reply::json(&model(&gateway, &id))
        }
        Err(error) => {
            gateway.metrics.count("/v1/models", error.code.status());
            reply::error(&error)
        }
    }
}

fn model(gateway: &Gateway, name: &str) -> Model {
    Model {
        id: name.to_owned(),
        object: "model",
        created: gateway.started,
        owned_by: "baton",
        max_model_len: gateway.max_context(),
    }
}
