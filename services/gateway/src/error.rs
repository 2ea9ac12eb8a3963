//! Why the gateway did not start or stopped, and how a router's error reads in OpenAI's terms.

use crate::config::ms;
use proto::ErrorCode;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("configuration: {0}")]
    Config(String),
    #[error("{path}: {problem}", path = path.display())]
    Model { path: PathBuf, problem: String },
    #[error("cannot listen on {address}: {source}; choose another port, or 0 for a free one")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("router address {address:?}: {problem}; expected one like http://127.0.0.1:7700")]
    RouterAddress { address: String, problem: String },
    #[error(transparent)]
    Tls(#[from] credentials::Error),
    #[error("keys.file {path}: {problem}", path = path.display())]
    Keys { path: PathBuf, problem: String },
    #[error("admin_token_file: {0}")]
    AdminToken(String),
    #[error("serving: {0}")]
    Serve(#[from] std::io::Error),
}

impl Error {
    pub(crate) fn model(path: &Path, problem: impl std::fmt::Display) -> Self {
        Error::Model { path: path.to_owned(), problem: problem.to_string() }
    }
}

/// Status and code for the client; `retry_after` holds where the router predicts nothing. HTTP statuses are those of `proto::ErrorCode::http_status`.
pub(crate) fn from_router(error: &proto::Error, retry_after: Duration) -> openai::Error {
    use openai::Code;
    let code = match error.code() {
        ErrorCode::InvalidRequest => Code::InvalidValue,
        ErrorCode::ContextLength => Code::ContextLength,
        ErrorCode::ModelNotFound => Code::ModelNotFound,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::QueueFull
        | ErrorCode::NoMembers
        | ErrorCode::NoCapacity
        | ErrorCode::Draining
        | ErrorCode::Mismatch => Code::Overloaded,
        ErrorCode::Deadline => Code::Deadline,
        ErrorCode::WorkerLost
        | ErrorCode::PeerLost
        | ErrorCode::StaleEpoch
        | ErrorCode::UnknownReservation
        | ErrorCode::Digest => Code::WorkerLost,
        ErrorCode::Internal | ErrorCode::Unspecified => Code::Internal,
    };
    let converted = openai::Error::new(code, error.message.clone());
    match error.retry_after_ms {
        0 if code == Code::Overloaded => converted.retry_after(retry_after),
        0 => converted,
        predicted => converted.retry_after(ms(predicted.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_status_tables_agree() {
        for raw in 0..=16 {
            let code = ErrorCode::try_from(raw).unwrap();
            let converted = from_router(&proto::Error::new(code, "why"), Duration::from_secs(1));
            assert_eq!(converted.code.status(), code.http_status(), "{code:?}");
            assert_eq!(converted.retry_after.is_some(), code.http_status() == 503, "{code:?}");
        }
        let full = proto::Error::new(ErrorCode::QueueFull, "full").retry_after(Duration::from_millis(7300));
        assert_eq!(from_router(&full, Duration::from_secs(1)).retry_after, Some(Duration::from_millis(7300)));
    }
}
