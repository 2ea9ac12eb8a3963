//! `POST /status/members/ID/drain`: has a worker leave, for who brings this gateway's admin token. The order goes to the
//! worker's admin port, where the membership has it, with the same token; what the worker says to it is passed on.

use super::reply;
use crate::gateway::Gateway;
use axum::body::{Body, to_bytes};
use axum::extract::{Path, State};
use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::{HeaderMap, Request, StatusCode, Uri};
use axum::response::Response;
use credentials::{Denied, TokenFile, bearer};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use openai::{Code, Error};
use proto::Member;
use serde_json::json;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

/// From dialling the worker to the last byte of its answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of what a worker may say.
const MOST_SAID: usize = 4 << 10;

pub async fn drain(
    State(gateway): State<Arc<Gateway>>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Response {
    let token = match token(gateway.admin_token.as_ref(), &headers) {
        Ok(token) => token,
        Err(error) => return refuse(&gateway, &error),
    };
    match order(&gateway, &id, &token).await {
        Ok(()) => {
            tracing::info!(member = id, "told to leave");
            let mut response = reply::json(&json!({"member": id, "draining": true}));
            *response.status_mut() = StatusCode::ACCEPTED;
            response
        }
        Err(error) => {
            tracing::warn!(member = openai::shorten(&id), %error, "not told to leave");
            reply::error(&error)
        }
    }
}

/// Counted and said as other refusals for want of a key are: strangers do not fill the log.
fn refuse(gateway: &Gateway, error: &Error) -> Response {
    tracing::debug!(%error, "refused an order");
    gateway.metrics.count("any", error.code.status());
    reply::error(error)
}

/// Why nobody knows that the order was taken.
enum Failure {
    /// It was not sent.
    Unreached(String),
    /// It was sent, and may have been taken.
    Unanswered(Code, String),
}

async fn order(gateway: &Gateway, id: &str, token: &str) -> Result<(), Error> {
    let seen = gateway.looks.fresh().await.map_err(|error| gateway.overloaded(&error.message))?;
    let member = find(&seen.status.members, id)?;
    match tell(member, token).await {
        Ok((status, _)) if status.is_success() => Ok(()),
        Ok((status, said)) => Err(Error::new(Code::WorkerRefused, refusal(member, status, &said))),
        Err(Failure::Unreached(why)) => Err(Error::new(Code::WorkerLost, unreached(member, &why))),
        Err(Failure::Unanswered(code, why)) => Err(Error::new(code, unanswered(member, &why))),
    }
}

/// The admin token, which was brought.
fn token(file: Option<&TokenFile>, headers: &HeaderMap) -> Result<String, Error> {
    let Some(file) = file else {
        return Err(Error::new(
            Code::AdminOnly,
            "This gateway takes no orders, as it has no admin token: set admin_token_file in its configuration, to the file \
             that the workers have. `baton drain` does without the gateway",
        ));
    };
    let given = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    match file.check(given) {
        Ok(()) => Ok(given.and_then(bearer).unwrap_or_default().to_owned()),
        Err(denied @ Denied::Unreadable) => Err(Error::new(Code::Internal, denied.to_string())),
        Err(denied) => Err(Error::new(Code::AdminToken, denied.to_string())),
    }
}

fn find<'a>(members: &'a [Member], id: &str) -> Result<&'a Member, Error> {
    members.iter().find(|member| member.id == id).ok_or_else(|| {
        let ids: Vec<&str> = members.iter().map(|member| member.id.as_str()).collect();
        let there = if ids.is_empty() { "none".to_owned() } else { ids.join(", ") };
        Error::new(
            Code::MemberNotFound,
            format!("There is no member {:?}; there are: {there}", openai::shorten(id)),
        )
    })
}

/// `POST /drain` on the admin port of `member`, and what came of it. Another may be there by now, and is told who is meant.
async fn tell(member: &Member, token: &str) -> Result<(StatusCode, String), Failure> {
    let deadline = Instant::now() + PATIENCE;
    let late = || format!("no answer within {} s", PATIENCE.as_secs());
    let connected = timeout_at(deadline, connect(member, token)).await.unwrap_or_else(|_| Err(late()));
    let (stream, request) = connected.map_err(Failure::Unreached)?;
    let sent = timeout_at(deadline, send(stream, request)).await;
    sent.map_err(|_| Failure::Unanswered(Code::Deadline, late()))?
        .map_err(|error| Failure::Unanswered(Code::WorkerLost, error.to_string()))
}

async fn connect(member: &Member, token: &str) -> Result<(TcpStream, Request<Body>), String> {
    let uri: Uri = member.admin_address.parse().map_err(said)?;
    let (Some("http"), Some(host)) = (uri.scheme_str(), uri.authority()) else {
        return Err("its admin address is none like http://host:7801".into());
    };
    let request = Request::post(format!("/drain?member={}", member.id))
        .header(HOST, host.as_str())
        .header(AUTHORIZATION, format!("Bearer {token}"))
        .body(Body::empty())
        .map_err(said)?;
    let name = host.host().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((name, host.port_u16().unwrap_or(80))).await.map_err(said)?;
    Ok((stream, request))
}

/// Whatever becomes of its words, the status says what the worker did.
async fn send(stream: TcpStream, request: Request<Body>) -> hyper::Result<(StatusCode, String)> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // The sender goes with the answer, and with the sender the connection.
    let asking = async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = to_bytes(Body::new(response.into_body()), MOST_SAID).await;
        let words = body.map(|body| String::from_utf8_lossy(&body).trim().to_owned());
        Ok((status, words.unwrap_or_else(|error| format!("its words cannot be read: {error}"))))
    };
    tokio::join!(asking, connection).0
}

fn said(error: impl Display) -> String {
    error.to_string()
}

fn refusal(member: &Member, status: StatusCode, said: &str) -> String {
    let remedy = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            "; gateway and workers must have the same token in admin_token_file"
        }
        StatusCode::NOT_FOUND => "; is it a Baton worker of this version?",
        _ => "",
    };
    format!("{} did not take the order ({status}): {said}{remedy}", member.id)
}

fn unreached(member: &Member, why: &str) -> String {
    format!(
        "{} cannot be told at {}: {why}; let gateways through to workers' admin ports (networkPolicy, firewall), or correct \
         its advertise_admin. SIGTERM to its process does the same",
        member.id, member.admin_address
    )
}

fn unanswered(member: &Member, why: &str) -> String {
    format!(
        "Whether {} was told at {} is not known: {why}; look at /status whether it drains",
        member.id, member.admin_address
    )
}
