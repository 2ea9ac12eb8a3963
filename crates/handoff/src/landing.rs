//! How the bytes of an offer get into their block: out of the message, or read from where they lie. Either way they are
//! believed only if what lies in the block then has the digest that was announced.

use crate::direct::{Piece, Pool};
use futures::{FutureExt, future::BoxFuture};
use kv::{BlockId, Digest, KvError, Payload, Pieces, StepId, Transfer};
use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering::SeqCst},
};

/// Completes when nothing of it writes any more, or with [`KvError::Lost`] when that can no longer be known.
pub(crate) type Landing = BoxFuture<'static, Result<(), KvError>>;

/// Where an offer belongs, and what must lie there.
pub(crate) struct Place {
    pub block: BlockId,
    pub rows: u32,
    pub digest: Digest,
}

/// How far a read of another worker's memory is: before and after it this worker's own device is what it waits for.
#[derive(Clone, Default)]
pub(crate) struct Reading(Arc<AtomicU8>);

const BEFORE: u8 = 0;
const UNDER_WAY: u8 = 1;
const AFTER: u8 = 2;
const GIVEN_UP: u8 = 3;

impl Reading {
    /// Whether it waits for the other worker. If it has not begun, it never will: nobody would watch it any more.
    pub fn give_up(&self) -> bool {
        self.0.compare_exchange(BEFORE, GIVEN_UP, SeqCst, SeqCst) == Err(UNDER_WAY)
    }

    fn begin(&self) -> Result<(), KvError> {
        let given_up = |_| KvError::Unreachable("it was given up before it began".into());
        self.0.compare_exchange(BEFORE, UNDER_WAY, SeqCst, SeqCst).map(drop).map_err(given_up)
    }

    fn end(&self) {
        self.0.store(AFTER, SeqCst);
    }
}

pub(crate) fn copy(pool: &Pool, to: Place, bytes: Pieces, after: StepId) -> Landing {
    let payload = Payload { bytes, digest: to.digest };
    landed(pool.memory.write(to.block, to.rows, payload, after)).boxed()
}

/// From `address` in the memory of `origin`, once the steps up to `after` have left the block alone.
pub(crate) fn fetch(
    pool: &Pool,
    to: Place,
    (origin, reading): (proto::Origin, Reading),
    address: usize,
    after: StepId,
) -> Landing {
    let Some((direct, region)) = pool.direct.clone() else {
        return async { Err(KvError::Unreachable("no transport that reads is open".into())) }.boxed();
    };
    let memory = pool.memory.clone();
    let layout = memory.layout();
    let at = region.block(&layout, to.block);
    let runs = layout.runs(to.rows).into_iter();
    let pieces =
        runs.map(|run| Piece { from: address.wrapping_add(run.at), to: at + run.at, bytes: run.bytes });
    let pieces = pieces.collect();
    async move {
        landed(memory.digest(to.block, 0, after)).await?;
        reading.begin()?;
        let silent = |_| Err(KvError::Lost("what reads has ended without a word".into()));
        let read = direct.read(&origin, pieces).await.unwrap_or_else(silent);
        reading.end();
        read?;
        landed(memory.digest(to.block, to.rows, after)).await?.expect(to.digest)
    }
    .boxed()
}

/// The end of a transfer; a device that went away without a word has stopped.
pub(crate) async fn landed<T>(transfer: Transfer<T>) -> Result<T, KvError> {
    transfer.await.unwrap_or_else(|_| Err(KvError::Stopped("it gave no answer".into())))
}
