//! What a request must show before anything is done for it, if API keys are configured: nothing for health, readiness and the
//! page that asks for a key; an operator's key for what tells of the process itself; any key for everything else. Orders to a
//! worker ask for the admin token instead, and see to that themselves.

use super::reply;
use crate::gateway::Gateway;
use crate::keys::{Caller, Left, Standing};
use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use openai::{Code, Error};
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, PartialEq)]
enum Need {
    Nothing,
    Key,
    AdminKey,
}

fn need(path: &str) -> Need {
    match path {
        "/" | "/health" | "/ready" | "/dashboard" => Need::Nothing,
        "/metrics" => Need::AdminKey,
        asset if asset.starts_with("/dashboard/") => Need::Nothing,
        order if order.starts_with("/status/members/") && order.ends_with("/drain") => Need::Nothing,
        _ => Need::Key,
    }
}

/// Lets a request pass with its caller, or refuses it.
pub async fn check(State(gateway): State<Arc<Gateway>>, mut request: Request, next: Next) -> Response {
    match caller(&gateway, request.uri().path(), request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            tracing::debug!(%error, path = request.uri().path(), "refused");
            gateway.metrics.count("any", error.code.status());
            reply::error(&error)
        }
    }
}

fn caller(gateway: &Gateway, path: &str, headers: &HeaderMap) -> Result<Option<Caller>, Error> {
    let Some(keys) = &gateway.keys else { return Ok(None) };
    let need = need(path);
    if need == Need::Nothing {
        return Ok(None);
    }
    let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    let caller = keys.find(given)?;
    if need == Need::AdminKey && !caller.admin {
        let message = format!("{path} needs an admin key here; the admin port shows it without");
        return Err(Error::new(Code::AdminOnly, message));
    }
    Ok(Some(caller))
}

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Tells a client where it stands, as OpenAI does.
pub fn mark(headers: &mut HeaderMap, standing: &Standing) {
    for (names, left) in [(REQUESTS, standing.requests), (TOKENS, standing.tokens)] {
        let Some(Left { limit, remaining, reset }) = left else { continue };
        let [of_limit, of_remaining, of_reset] = names;
        headers.insert(of_limit, limit.into());
        headers.insert(of_remaining, remaining.into());
        if let Ok(value) = HeaderValue::from_str(&duration(reset)) {
            headers.insert(of_reset, value);
        }
    }
}

/// As OpenAI writes it: 120ms, 7.66s, 6m0s.
fn duration(time: Duration) -> String {
    let ms = time.as_nanos().div_ceil(1_000_000);
    let (minutes, ms) = (ms / 60_000, ms % 60_000);
    match (minutes, ms) {
        (0, ms) if ms < 1000 => format!("{ms}ms"),
        (0, ms) => format!("{}s", ms as f64 / 1000.0),
        (minutes, ms) => format!("{minutes}m{}s", ms as f64 / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_shows_nothing_is_open() {
        for (path, expected) in [
            ("/health", Need::Nothing),
            ("/ready", Need::Nothing),
            ("/dashboard", Need::Nothing),
            ("/dashboard/page.js", Need::Nothing),
            ("/", Need::Nothing),
            ("//", Need::Key),
            ("/status/history", Need::Key),
            ("/dashboards", Need::Key),
            ("/health/x", Need::Key),
            ("/status", Need::Key),
            ("/status/members/decode-1", Need::Key),
            ("/status/members/decode-1/drain", Need::Nothing),
            ("/trace/abc", Need::Key),
            ("/v1/models", Need::Key),
            ("/metrics", Need::AdminKey),
        ] {
            assert_eq!(need(path), expected, "{path}");
        }
    }

    #[test]
    fn times_are_written_as_openai_does() {
        for (ms, text) in [(0, "0ms"), (120, "120ms"), (7660, "7.66s"), (360_000, "6m0s"), (61_500, "1m1.5s")]
        {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
    }
}
