//! `GET /trace/REQUEST_ID`: where the time of a request went that ended lately, for `baton trace`.

use super::reply;
use crate::gateway::Gateway;
use crate::keys::Caller;
use crate::record::Record;
use axum::Extension;
use axum::extract::{Path, State};
use axum::response::Response;
use openai::{Code, Error};
use std::sync::Arc;

pub async fn trace(
    State(gateway): State<Arc<Gateway>>,
    caller: Option<Extension<Option<Caller>>>,
    Path(id): Path<String>,
) -> Response {
    // The admin port knows no callers, and a gateway without keys none either.
    let caller = caller.and_then(|Extension(caller)| caller);
    let shown = |record: &Record| {
        caller.as_ref().is_none_or(|caller| caller.admin || record.tenant.as_ref() == Some(&caller.tenant))
    };
    match gateway.records.find(&id, shown) {
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
