//! `GET /trace/REQUEST_ID`: where the time of a request went that ended lately, for `baton trace`.

use super::reply;
use crate::gateway::Gateway;
use axum::extract::{Path, State};
use axum::response::Response;
use openai::{Code, Error};
use std::sync::Arc;

pub async fn trace(State(gateway): State<Arc<Gateway>>, Path(id): Path<String>) -> Response {
    match gateway.records.find(&id) {
        Some(record) => reply::json(&*record),
        None => reply::error(&Error::new(
            Code::RequestNotFound,
            format!(
                "No record of the request {:?}: this gateway keeps those of the last requests that ended here. \
                 Its id is the header x-request-id of the answer.",
                openai::shorten(&id)
            ),
        )),
    }
}
