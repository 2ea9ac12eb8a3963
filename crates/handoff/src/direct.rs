//! The seam to transports that read the other side's memory themselves: an offer then carries a place in place of bytes,
//! decode reads from there into its own block, compares the digest of what it has, and accepts. Everything else of the
//! protocol is the same. Knows no such transport; `nixl.rs` is one.

use crate::Error;
use kv::{KvError, KvMemory, Region, Transfer};
use std::sync::Arc;

/// Reads of other workers' memories, into the pool that it was opened on.
pub trait Direct: Send + Sync {
    /// For messages.
    fn name(&self) -> &'static str;

    /// What others need in order to read this worker's pool.
    fn origin(&self) -> proto::Origin;

    /// Copies every piece from `origin`'s memory into this process's. Completes once nothing of it writes any more, be it
    /// with [`KvError::Unreachable`]; or with [`KvError::Lost`] when that will never be known. Whoever asks holds the block
    /// until then, and a lost one for ever.
    fn read(&self, origin: &proto::Origin, pieces: Vec<Piece>) -> Transfer<()>;

    /// Reads from `origin` take too long. Nothing can stop those under way: they complete when they do, and until the last of
    /// them has, further ones are refused.
    fn sever(&self, origin: &proto::Origin);
}

/// A run of bytes of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In the other side's memory.
    pub from: usize,
    /// In this process's.
    pub to: usize,
    pub bytes: usize,
}

/// A worker's blocks and how their bytes reach others: in offers, unless there is a way to read them.
#[derive(Clone)]
pub struct Pool {
    pub(crate) memory: Arc<dyn KvMemory>,
    pub(crate) direct: Option<(Arc<dyn Direct>, Region)>,
}

impl Pool {
    /// Blocks that others read through `direct`, which was opened on the same memory.
    pub fn direct(memory: Arc<dyn KvMemory>, direct: Arc<dyn Direct>) -> Result<Pool, Error> {
        let region = memory.region().ok_or(KvError::NoRegion("its pool lies in a device or in pieces"))?;
        Ok(Pool { memory, direct: Some((direct, region)) })
    }

    /// Name of the transport of bytes.
    pub fn transport(&self) -> &'static str {
        self.direct.as_ref().map_or("grpc", |(direct, _)| direct.name())
    }

    pub(crate) fn origin(&self) -> Option<proto::Origin> {
        self.direct.as_ref().map(|(direct, _)| direct.origin())
    }
}

impl From<Arc<dyn KvMemory>> for Pool {
    fn from(memory: Arc<dyn KvMemory>) -> Self {
        Pool { memory, direct: None }
    }
}

impl<M: KvMemory + 'static> From<Arc<M>> for Pool {
    fn from(memory: Arc<M>) -> Self {
        Pool { memory, direct: None }
    }
}
