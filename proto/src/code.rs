//! Error codes: gRPC status, HTTP status and whether another worker may succeed, each decided once here.

use crate::{Error, ErrorCode};
use tonic::{Code, Status};

/// Name of the gRPC metadata entry that carries the exact [`ErrorCode`] beside the coarser status.
const METADATA_KEY: &str = "baton-code";

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
        Error { code: code as i32, message: message.into() }
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
        status
    }
}

/// The error a peer reported; a transport failure without a Baton code reads as a lost worker.
impl From<Status> for Error {
    fn from(status: Status) -> Error {
        let code = status
            .metadata()
            .get(METADATA_KEY)
            .and_then(|value| value.to_str().ok()?.parse::<i32>().ok())
            .and_then(|code| ErrorCode::try_from(code).ok())
            .unwrap_or_else(|| from_grpc(status.code()));
        Error::new(code, status.message())
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
            let back = Error::from(Status::from(Error::new(code, "why")));
            assert_eq!((back.code(), back.message.as_str()), (code, "why"));
        }
    }
}
