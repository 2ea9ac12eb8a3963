//! Who is asking: the request's id, its trace, its tenant, and whether it wants its record. Every answer carries the id and the time taken.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};
use axum::middleware::Next;
use axum::response::Response;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;
use telemetry::trace::{TRACEPARENT, TraceContext};
use uuid::Uuid;

#[derive(Clone)]
pub struct Identity {
    pub request_id: String,
    /// What the client sent.
    pub trace: Option<TraceContext>,
    /// Without keys: a fingerprint of what the client sent as one, never the text itself; empty if it sent none.
    pub tenant: String,
    /// `x-baton-trace: 1`
    pub wants_record: bool,
}

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
/// Asks for the record of the request in its answer.
const WANTS_RECORD: HeaderName = HeaderName::from_static("x-baton-trace");
/// Longest id that is taken from a client.
const MAX_ID: usize = 128;

pub async fn identify(mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let identity = Identity::of(request.headers());
    let id = HeaderValue::from_str(&identity.request_id);
    request.extensions_mut().insert(identity);
    let mut response = next.run(request).await;
    if let Ok(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.headers_mut().insert(PROCESSING_MS, (start.elapsed().as_millis() as u64).into());
    response
}

impl Identity {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let given = text(&REQUEST_ID).filter(|id| sane(id)).map(str::to_owned);
        let trace = text(&HeaderName::from_static(TRACEPARENT)).and_then(TraceContext::parse);
        Identity {
            request_id: given.unwrap_or_else(|| Uuid::new_v4().to_string()),
            trace,
            tenant: text(&AUTHORIZATION).map_or_else(String::new, fingerprint),
            wants_record: text(&WANTS_RECORD) == Some("1"),
        }
    }
}

fn sane(id: &str) -> bool {
    (1..=MAX_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b))
}

fn fingerprint(authorization: &str) -> String {
    let mut hasher = DefaultHasher::new();
    authorization.trim().trim_start_matches("Bearer ").trim().hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &'static str, value: &str) -> Identity {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        Identity::of(&headers)
    }

    #[test]
    fn only_sane_ids_are_echoed() {
        assert_eq!(of("x-request-id", "abc-1.2").request_id, "abc-1.2");
        for bad in ["", "a b", "a\"b", "é", &"x".repeat(129)] {
            assert_ne!(of("x-request-id", bad).request_id, bad);
        }
    }

    #[test]
    fn traces_go_on_and_keys_stay_secret() {
        let trace = of("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").trace;
        assert_eq!(trace.unwrap().trace_id_hex(), "0af7651916cd43dd8448eb211c80319c");
        let tenant = of("authorization", "Bearer sk-secret").tenant;
        assert_eq!((tenant.len(), tenant.contains("secret")), (16, false));
        assert_eq!(tenant, of("authorization", "Bearer  sk-secret ").tenant);
    }
}
