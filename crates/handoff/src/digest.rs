//! What an offered block is announced by: the digest of its bytes, which the device that holds them computes, sealed with
//! the prefix they stand for, the block's index and the layout, so that a block that arrives intact but in the wrong place
//! is refused too. Knows digests, not bytes.
//!
//! `seal = digest ⊕ XXH64(prefix (u128) ‖ index (u32) ‖ rows (u32) ‖ layout (u64), seed = 0)`, little-endian. Whoever expects
//! a block takes the seal off with its own binding: of another block, or another's place, there is left the digest of no
//! bytes that could come (but once in 2^64), and the device that writes says so.

use kv::{BlockHash, Digest};
use std::hash::Hasher;
use twox_hash::XxHash64;

/// What the bytes of a block are claimed to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// Hash of the block's tokens and all before them; see [`prefix_hashes`].
    pub prefix: BlockHash,
    /// Index of the block in its sequence.
    pub index: u32,
    /// Valid tokens in it.
    pub rows: u32,
    /// [`kv::KvLayout::fingerprint`].
    pub layout: u64,
}

impl Binding {
    /// `digest` as it is announced.
    pub fn seal(&self, digest: Digest) -> u64 {
        digest.0 ^ self.hash()
    }

    /// The digest that the bytes must have, by what they were announced with.
    pub fn open(&self, seal: u64) -> Digest {
        Digest(seal ^ self.hash())
    }

    fn hash(&self) -> u64 {
        let mut hasher = XxHash64::with_seed(0);
        hasher.write(&self.prefix.0.to_le_bytes());
        hasher.write(&self.index.to_le_bytes());
        hasher.write(&self.rows.to_le_bytes());
        hasher.write(&self.layout.to_le_bytes());
        hasher.finish()
    }
}

/// A binding for each block of `tokens`, the partial last one included: its prefix hash is that of its
/// parent followed by the tokens it has.
pub fn bindings(tokens: &[u32], block_tokens: u32, layout: u64) -> Vec<Binding> {
    let mut prefix = BlockHash::ROOT;
    let chunks = tokens.chunks(block_tokens as usize).enumerate();
    chunks
        .map(|(index, block)| {
            prefix = prefix.then(block);
            Binding { prefix, index: index as u32, rows: block.len() as u32, layout }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BINDING: Binding = Binding {
        prefix: BlockHash(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        index: 3,
        rows: 17,
        layout: 42,
    };

    /// Computed by an independent implementation of the XXH64 specification.
    #[test]
    fn vector() {
        assert_eq!(BINDING.seal(Digest(0)), 0xfc5b_3ee6_525d_373d);
        assert_eq!(BINDING.seal(Digest(5)), 0xfc5b_3ee6_525d_3738);
    }

    #[test]
    fn every_part_is_bound() {
        let digest = Digest::of(b"rows");
        let seal = BINDING.seal(digest);
        assert_eq!(BINDING.open(seal), digest);
        for other in [
            Binding { prefix: BlockHash(1), ..BINDING },
            Binding { index: 4, ..BINDING },
            Binding { rows: 18, ..BINDING },
            Binding { layout: 43, ..BINDING },
        ] {
            assert_ne!(other.open(seal), digest);
        }
    }

    #[test]
    fn a_partial_block_is_named_by_its_parent_and_its_tokens() {
        let all = bindings(&[1, 2, 3, 4, 5], 2, 7);
        assert_eq!(all.len(), 3);
        assert_eq!(all[2].rows, 1);
        assert_eq!(all[2].prefix, BlockHash::ROOT.then(&[1, 2]).then(&[3, 4]).then(&[5]));
        assert_ne!(all[2], bindings(&[1, 2, 3, 9, 5], 2, 7)[2]);
    }
}
