//! What can go wrong between two workers, and the code under which others are told.

use kv::KvError;
use proto::ErrorCode;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{address}` is not an address of a decode worker: {cause}; expected http://host:port")]
    Address { address: String, cause: String },
    #[error("the decode worker at {address} cannot be reached or broke off: {cause}")]
    Transport { address: String, cause: String },
    /// The other side's own words.
    #[error("decode answered: {0}")]
    Peer(proto::Error),
    #[error("KV blocks cannot be read: {0}")]
    Memory(#[from] KvError),
    #[error("the transport through NIXL cannot be used: {0}")]
    Nixl(String),
    #[error("decode refused block {index} as often as allowed: {cause}")]
    Refused { index: u32, cause: String },
    #[error("decode was silent for longer than {0:?}")]
    Silent(std::time::Duration),
    #[error("decode broke the protocol: {0}")]
    Protocol(String),
}

impl Error {
    /// The code under which the router is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Error::Address { .. } => ErrorCode::InvalidRequest,
            Error::Peer(error) => error.code(),
            Error::Refused { .. } => ErrorCode::Digest,
            Error::Transport { .. } | Error::Silent(_) => ErrorCode::WorkerLost,
            Error::Memory(_) | Error::Nixl(_) | Error::Protocol(_) => ErrorCode::Internal,
        }
    }
}

impl From<Error> for proto::Error {
    fn from(error: Error) -> Self {
        proto::Error::new(error.code(), error.to_string())
    }
}
