//! Error codes: gRPC status, HTTP status and whether another worker may succeed, each decided once here.

use crate::{Error, ErrorCode};
use std::time::Duration;
use tonic::{Code, Status};

/// Name of the gRPC metadata entry that carries the exact [`ErrorCode`] beside the coarser status.
const METADATA_KEY: &str = "baton-code";
/// The same for [`Error::retry_after_ms`], if it is known.
const RETRY_AFTER_KEY: &str = "baton-retry-after-ms";

impl ErrorCode {
    /// Whether the same request may succeed on other workers. Decides retries in the router.
    pub fn is_retryable(self) -> bool {
        use ErrorCode::*;
        matches!(
            self,
            NoCapacity
                | StaleEpoch
                | UnknownReservation
                | Digest
                | WorkerLost
                | PeerLost
                | Draining
                | Internal
        )
    }

    pub fn http_status(self) -> u16 {
        use ErrorCode::*;
        match self {
            InvalidRequest | ContextLength => 400,
            ModelNotFound => 404,
            Cancelled => 499,
            QueueFull | NoMembers | NoCapacity | Draining | Mismatch => 503,
            Deadline => 504,
            WorkerLost | PeerLost | StaleEpoch | UnknownReservation | Digest => 502,
            Internal | Unspecified => 500,
        }
    }

    fn grpc(self) -> Code {
        use ErrorCode::*;
        match self {
            InvalidRequest => Code::InvalidArgument,
            ContextLength => Code::OutOfRange,
            ModelNotFound | UnknownReservation => Code::NotFound,
            QueueFull | NoCapacity => Code::ResourceExhausted,
            Deadline => Code::DeadlineExceeded,
            NoMembers | WorkerLost | PeerLost | Draining => Code::Unavailable,
            Mismatch => Code::FailedPrecondition,
            StaleEpoch => Code::Aborted,
            Digest => Code::DataLoss,
            Cancelled => Code::Cancelled,
            Internal | Unspecified => Code::Internal,
        }
    }
}

impl Error {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Error { code: code as i32, message: message.into(), retry_after_ms: 0 }
    }

    /// With the time after which trying again may help, rounded up.
    pub fn retry_after(self, after: Duration) -> Self {
        let ms = after.as_nanos().div_ceil(1_000_000).max(1);
        Error { retry_after_ms: u32::try_from(ms).unwrap_or(u32::MAX), ..self }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        let mut status = Status::new(error.code().grpc(), error.message.clone());
        status.metadata_mut().insert(METADATA_KEY, (error.code as u32).into());
        if error.retry_after_ms > 0 {
            status.metadata_mut().insert(RETRY_AFTER_KEY, error.retry_after_ms.into());
        }
        status
    }
}

/// The error a peer reported; a transport failure without a Baton code reads as a lost worker.
impl From<Status> for Error {
    fn from(status: Status) -> Error {
        let number = |key| status.metadata().get(key)?.to_str().ok()?.parse::<u32>().ok();
        let code = number(METADATA_KEY)
            .and_then(|code| ErrorCode::try_from(code as i32).ok())
            .unwrap_or_else(|| from_grpc(status.code()));
        Error { retry_after_ms: number(RETRY_AFTER_KEY).unwrap_or(0), ..Error::new(code, status.message()) }
    }
}

fn from_grpc(code: Code) -> ErrorCode {
    match code {
        Code::InvalidArgument => ErrorCode::InvalidRequest,
        Code::Cancelled => ErrorCode::Cancelled,
        Code::DeadlineExceeded => ErrorCode::Deadline,
        Code::ResourceExhausted => ErrorCode::NoCapacity,
        _ => ErrorCode::WorkerLost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for raw in 0..=16 {
            let code = ErrorCode::try_from(raw).unwrap();
            let sent = Error::new(code, "why").retry_after(Duration::from_micros(1500));
            let back = Error::from(Status::from(sent));
            assert_eq!((back.code(), back.message.as_str(), back.retry_after_ms), (code, "why", 2));
        }
    }
}
