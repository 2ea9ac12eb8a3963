//! A request's head: how many header fields, and how large with the URL. What exceeds this several times over never gets
//! here: the connection answers with a bare 431.

use super::reply;
use crate::config::Limits;
use crate::gateway::Gateway;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use openai::{Code, Error};
use std::sync::Arc;

pub async fn check(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    match fits(&request, &gateway.config.limits) {
        Ok(()) => next.run(request).await,
        Err(error) => {
            gateway.metrics.count("any", error.code.status());
            reply::error(&error)
        }
    }
}

fn fits(request: &Request, limits: &Limits) -> Result<(), Error> {
    let headers = request.headers();
    let too_large = |problem: String| Err(Error::new(Code::HeadersTooLarge, problem));
    if headers.len() > limits.headers {
        return too_large(format!(
            "found {} header fields, expected at most {}",
            headers.len(),
            limits.headers
        ));
    }
    let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>();
    let bytes = bytes + request.uri().path_and_query().map_or(0, |path| path.as_str().len());
    if bytes > limits.header_bytes {
        return too_large(format!(
            "URL and header fields have {bytes} bytes, expected at most {}",
            limits.header_bytes
        ));
    }
    Ok(())
}
