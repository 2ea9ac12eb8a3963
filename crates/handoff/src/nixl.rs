//! The transport through NIXL: RDMA where there is such a network, shared memory or TCP elsewhere, as its UCX plugin finds. The
//! library is loaded when it is asked for; a binary built without the feature `rdma`, or a machine without the library, is
//! told so. One thread owns NIXL's agent, posts the reads, and watches them. Knows no protocol.

use crate::{Error, direct::Direct};
use kv::KvMemory;
use std::sync::Arc;

#[cfg(feature = "rdma")]
mod agent;

/// Whether it can be used at all. Loads the library.
#[cfg(feature = "rdma")]
pub fn check() -> Result<(), Error> {
    agent::check()
}

#[cfg(not(feature = "rdma"))]
pub fn check() -> Result<(), Error> {
    let message = "this binary was built without it; build it with --features rdma, or use --transport grpc";
    Err(Error::Nixl(message.to_owned()))
}

/// Registers the memory's pool, once and whole. `member` names this incarnation of the worker.
#[cfg(feature = "rdma")]
pub fn open(member: &str, memory: &dyn KvMemory) -> Result<Arc<dyn Direct>, Error> {
    agent::Nixl::open(member, memory)
}

#[cfg(not(feature = "rdma"))]
pub fn open(_member: &str, _memory: &dyn KvMemory) -> Result<Arc<dyn Direct>, Error> {
    check().map(|()| unreachable!("without it, it cannot be used"))
}
