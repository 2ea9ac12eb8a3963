//! What can go wrong. Only wrong configuration reaches callers; the rest is retried and logged.

use std::{path::PathBuf, time::Duration};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "membership needs exactly one source: set either `etcd` (a list of endpoint URLs) or \
         `registry` (the URL of a router); {0}"
    )]
    Source(&'static str),
    #[error(
        "membership: `{url}` is not an {scheme} URL ({reason}); write it as {scheme}host:port{}",
        if url.starts_with("https://") { "; for https:// set tls" } else { "" }
    )]
    Url { url: String, scheme: &'static str, reason: String },
    #[error("membership: registry `{url}`: {reason}")]
    Registry { url: String, reason: String },
    #[error("membership: tls: {0}")]
    Tls(&'static str),
    #[error("membership: tls: {} cannot be used ({reason}); give a PEM file", path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("membership: lease_ms = {0} is out of range; choose 1000 to 300000 milliseconds")]
    Lease(u64),
    #[error("membership: prefix `{0}` must not be empty nor contain '/'")]
    Prefix(String),

    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("the stream ended")]
    Ended,
    #[error("the watch was cancelled: {0}")]
    WatchCancelled(String),
    #[error("others keep writing this member's key")]
    Contended,
    #[error("a later join with the same id took this member over")]
    Superseded,
    #[error("{} ({})", .0.message(), .0.code())]
    Status(#[from] tonic::Status),
    #[error(transparent)]
    Etcd(#[from] etcd_client::Error),
}
