//! Blocks of the KV cache: their names (hashes), their bookkeeping ([`BlockPool`]), the shape of
//! their bytes ([`KvLayout`]), what those bytes are known by ([`Digest`]) and the seam through which they are read and
//! written ([`KvMemory`]). Owns no device memory and knows neither engine nor wire.

mod digest;
mod hash;
mod layout;
mod list;
mod memory;
mod payload;
mod pool;

pub use digest::{Digest, HashedCopy};
pub use hash::{BlockHash, hash_blocks};
pub use layout::{KvDtype, KvLayout};
pub use memory::{KvError, KvMemory, Region, Reply, Run, StepId, Transfer, transfer};
pub use payload::{Payload, Pieces};
pub use pool::{BlockPool, Counts, Holder, Match};

/// Index of a block in its pool.
pub type BlockId = u32;
