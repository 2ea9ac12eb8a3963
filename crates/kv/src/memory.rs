//! The bytes behind the blocks. Reads and writes are asynchronous and ordered against the engine's
//! steps, never against wall time, so that a device can run them on a copy stream.

use crate::{BlockId, Digest, KvLayout, Payload};
use std::{any::Any, fmt, sync::Arc};
use tokio::sync::oneshot;

/// Number of a step, counted from 1 by an executor; 0 is "before the first".
pub type StepId = u64;

#[derive(Clone, Debug, thiserror::Error)]
pub enum KvError {
    #[error("the device that holds the KV blocks has stopped: {0}")]
    Stopped(String),
    #[error("block {block} is outside the pool of {blocks} blocks")]
    NoSuchBlock { block: BlockId, blocks: u32 },
    #[error("payload is {found} bytes, {rows} rows of this layout are {expected}")]
    WrongLength { rows: u32, expected: usize, found: usize },
    #[error("this memory cannot be read by other workers: {0}")]
    NoRegion(&'static str),
    #[error("the memory of the other worker cannot be read: {0}")]
    Unreachable(String),
    /// The block may never be used again.
    #[error("whether anything still writes into the block will never be known: {0}")]
    Lost(String),
    /// The block must not be used.
    #[error(
        "what landed has digest {:016x} and was sent with {:016x}: damaged on the way, or of another prefix or place",
        found.0, sent.0
    )]
    Damaged { sent: Digest, found: Digest },
}

/// Completes when the copy is done. A dropped sender means the device has stopped.
pub type Transfer<T> = oneshot::Receiver<Result<T, KvError>>;

/// Where whoever copies says that it is done.
pub type Reply<T> = oneshot::Sender<Result<T, KvError>>;

/// Both ends of a transfer.
pub fn transfer<T>() -> (Reply<T>, Transfer<T>) {
    oneshot::channel()
}

/// A pool as one range of this process's memory, block after block, for transports that read and write it themselves.
#[derive(Clone)]
pub struct Region {
    pub address: usize,
    pub bytes: usize,
    /// What keeps the memory where it is.
    _keep: Arc<dyn Any + Send + Sync>,
}

/// A run of a block's bytes, from the begin of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub at: usize,
    pub bytes: usize,
}

impl Region {
    /// `keep` owns the memory, which stays and is not moved while that lives.
    pub fn new(address: usize, bytes: usize, keep: Arc<dyn Any + Send + Sync>) -> Region {
        Region { address, bytes, _keep: keep }
    }

    /// Where a block begins.
    pub fn block(&self, layout: &KvLayout, block: BlockId) -> usize {
        self.address + block as usize * layout.block_bytes()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

/// Access to the pool's bytes. Exclusive use of a block is the caller's duty and follows from
/// [`crate::BlockPool`]: a block is read while an offer holds it and written while a reservation does.
pub trait KvMemory: Send + Sync {
    fn layout(&self) -> KvLayout;

    /// Blocks in the pool.
    fn blocks(&self) -> u32;

    /// Copies out the first `rows` tokens of every layer of `block`, as they are after step `after`, with the digest of what
    /// lies in the block.
    fn read(&self, block: BlockId, rows: u32, after: StepId) -> Transfer<Payload>;

    /// Copies `payload` (the form `read` gives) into `block`, after step `after` and before every step submitted once the
    /// transfer has completed; completes with [`KvError::Damaged`] if what lies in the block then has another digest.
    fn write(&self, block: BlockId, rows: u32, payload: Payload, after: StepId) -> Transfer<()>;

    /// Where the pool lies, if a transport may reach it without [`Self::read`] and [`Self::write`].
    fn region(&self) -> Option<Region> {
        None
    }

    /// The digest of the first `rows` tokens of every layer as they lie in `block`, after step `after`; of no rows it is a
    /// fence: what was asked for before has been done. Every memory with a region has it.
    fn digest(&self, _block: BlockId, _rows: u32, _after: StepId) -> Transfer<Digest> {
        let (reply, transfer) = transfer();
        let _ = reply.send(Err(KvError::NoRegion("it has no digests in place")));
        transfer
    }
}
