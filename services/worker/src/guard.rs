//! What changes this worker, for those alone who bring the admin token, if one is configured.

use crate::Error;
use axum::{
    Router,
    extract::{Request, State},
    http::{
        StatusCode,
        header::{AUTHORIZATION, ORIGIN},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use credentials::{Denied, TokenFile};
use std::path::PathBuf;

/// The routes behind the token in `file`.
pub fn guard(routes: Router, file: Option<PathBuf>) -> Result<Router, Error> {
    let routes = routes.layer(middleware::from_fn(no_pages));
    let Some(file) = file else { return Ok(routes) };
    let token = TokenFile::open(file).map_err(Error::AdminToken)?;
    Ok(routes.layer(middleware::from_fn_with_state(token, check)))
}

/// Browsers say which page a request comes from: no page has orders to give, whatever its reader can reach.
async fn no_pages(request: Request, next: Next) -> Response {
    if request.headers().contains_key(ORIGIN) {
        tracing::warn!(path = request.uri().path(), "refused an order of a web page");
        return (StatusCode::FORBIDDEN, "web pages have no orders to give\n").into_response();
    }
    next.run(request).await
}

async fn check(State(token): State<TokenFile>, request: Request, next: Next) -> Response {
    let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    match token.check(given) {
        Ok(()) => next.run(request).await,
        Err(denied) => {
            tracing::warn!(path = request.uri().path(), %denied, "refused");
            (status(&denied), format!("{denied}\n")).into_response()
        }
    }
}

fn status(denied: &Denied) -> StatusCode {
    match denied {
        Denied::Missing => StatusCode::UNAUTHORIZED,
        Denied::Wrong => StatusCode::FORBIDDEN,
        Denied::Unreadable => StatusCode::SERVICE_UNAVAILABLE,
    }
}
