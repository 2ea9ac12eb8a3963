//! A request's body: JSON, bounded in size and time.

use crate::config::{Config, ms};
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use futures::StreamExt;
use openai::{Code, Error};
use tokio::time::timeout;

/// How much of a body that is too large is read before the refusal, so that the client reads the refusal
/// instead of a broken connection: times the limit.
const PATIENCE: usize = 4;

pub async fn read(request: Request, config: &Config) -> Result<Bytes, Error> {
    check_type(request.headers())?;
    let (limit, wait) = (config.limits.body_bytes, ms(config.timeouts.body_ms));
    let announced = announced(request.headers());
    match timeout(wait, collect(request.into_body(), limit, announced)).await {
        Ok(body) => body,
        Err(_) => Err(Error::new(
            Code::BodyTimeout,
            format!("the body was not complete after {} s", wait.as_secs_f32()),
        )),
    }
}

fn check_type(headers: &HeaderMap) -> Result<(), Error> {
    let given = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = given.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    let found = if given.is_empty() { "none".to_owned() } else { format!("{:?}", openai::shorten(given)) };
    Err(Error::new(Code::MediaType, format!("content-type must be application/json, found {found}")))
}

fn announced(headers: &HeaderMap) -> usize {
    headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0)
}

async fn collect(body: Body, limit: usize, announced: usize) -> Result<Bytes, Error> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::with_capacity(announced.min(limit));
    let mut seen = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece
            .map_err(|error| Error::new(Code::InvalidJson, format!("the body could not be read: {error}")))?;
        seen += piece.len();
        if seen > limit.saturating_mul(PATIENCE) {
            break;
        }
        if seen <= limit {
            bytes.extend_from_slice(&piece);
        }
    }
    if seen > limit {
        return Err(Error::new(Code::TooLarge, format!("the body exceeds {limit} bytes")));
    }
    Ok(bytes.into())
}
