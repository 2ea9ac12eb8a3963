//! Answers that are not streams: JSON, errors with what clients need to retry rightly.

use axum::body::Body;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use openai::{Code, Error};
use serde::Serialize;

const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

pub fn json(value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => with_body(StatusCode::OK, body),
        Err(problem) => {
            error(&Error::new(Code::Internal, format!("the answer cannot be written as JSON: {problem}")))
        }
    }
}

pub fn error(error: &Error) -> Response {
    let status = StatusCode::from_u16(error.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = with_body(status, error.body().to_string().into_bytes());
    if let Some(after) = error.retry_after {
        // Rounded up: who comes back at that time must not be early.
        let ms = u64::try_from(after.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX);
        response.headers_mut().insert(RETRY_AFTER, ms.div_ceil(1000).into());
        response.headers_mut().insert(RETRY_AFTER_MS, ms.into());
    }
    response
}

/// The same as bytes, where there is no request to answer: the connection ends with it.
pub fn last_words(error: &Error) -> Vec<u8> {
    let response = self::error(error);
    let mut text = format!("HTTP/1.1 {}\r\nconnection: close\r\n", response.status());
    for (name, value) in response.headers() {
        text += &format!("{name}: {}\r\n", value.to_str().unwrap_or_default());
    }
    let body = error.body().to_string();
    text += &format!("content-length: {}\r\n\r\n{body}", body.len());
    text.into_bytes()
}

fn with_body(status: StatusCode, body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
