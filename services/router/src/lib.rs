//! The router: owner of every request from queue to last token. Queues it, places it on a prefill and a
//! decode worker, carries its tokens to the gateway, and places it again when a worker is lost. Serves the
//! membership registry when there is no etcd. Sees token ids only, and never a KV byte.

mod admission;
mod call;
mod channels;
mod cluster;
mod config;
#[cfg(test)]
mod fakes;
mod lost;
mod metrics;
mod path;
mod placed;
mod policy;
mod prefixes;
mod probe;
mod queue;
mod request;
mod serve;
mod service;
mod shares;
mod status;

pub use config::{Config, Liveness, Members, Pools, Prefill, Queue};
pub use serve::{Router, run};

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
};
use tokio::sync::watch;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("router configuration: {0}")]
    Config(String),
    #[error("router: {0}")]
    Tls(#[from] credentials::Error),
    #[error("router: {0}")]
    Membership(#[from] membership::Error),
    #[error(
        "router: cannot listen on {address}: {source}; choose another address, or port 0 for any free one"
    )]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("router: gRPC server: {0}")]
    Grpc(#[from] tonic::transport::Error),
    #[error("router: gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    #[error("router: admin server: {0}")]
    Admin(#[from] std::io::Error),
}

/// What all requests share.
pub(crate) struct Shared {
    pub config: Config,
    pub cluster: Arc<cluster::Cluster>,
    pub admission: Arc<admission::Admission>,
    pub channels: channels::Channels,
    pub metrics: metrics::Metrics,
    pub spans: telemetry::Spans,
    /// Stopping: no new requests.
    pub draining: AtomicBool,
    /// Has one receiver for each request, waiting or running, to its last event.
    pub lives: watch::Sender<()>,
}

impl Shared {
    /// Whether somebody still waits for the end of an answer.
    pub fn lives(&self) -> bool {
        self.lives.receiver_count() > 0
    }
}
