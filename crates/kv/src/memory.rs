//! The bytes behind the blocks. Reads and writes are asynchronous and ordered against the engine's
//! steps, never against wall time, so that a device can run them on a copy stream.

use crate::{BlockId, Digest, KvLayout, Payload};
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
}
