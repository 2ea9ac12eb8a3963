//! What the bytes of a block are known by: a tree over fixed-size leaves, so that the device that holds them computes it in
//! parallel, both where they leave and where they land. A leaf knows its place, so that leaves cannot change theirs unnoticed.
//!
//! `leaf[i] = XXH64(bytes[i * 4096 ..][.. 4096], seed = i)`, the last leaf being what is left; `digest = XXH64(leaf hashes,
//! seed = 0)`, little-endian. XXH64: <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>. Damage goes unnoticed
//! once in 2^64; it is no defence against somebody who forges blocks.

use crate::KvError;
use bytes::Bytes;
use xxhash_rust::xxh64::{Xxh64, xxh64};

/// Digest of the valid rows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// Bytes of a leaf.
    pub const LEAF: usize = 4096;

    pub fn of(bytes: &[u8]) -> Digest {
        let leaves = bytes.chunks(Digest::LEAF).enumerate();
        Digest::of_leaves(leaves.map(|(index, leaf)| xxh64(leaf, index as u64)))
    }

    /// Of leaves that somebody else has hashed.
    pub fn of_leaves(leaves: impl IntoIterator<Item = u64>) -> Digest {
        let mut root = Xxh64::new(0);
        leaves.into_iter().for_each(|leaf| root.update(&leaf.to_le_bytes()));
        Digest(root.digest())
    }

    /// Whether what landed is what was sent.
    pub fn expect(self, sent: Digest) -> Result<(), KvError> {
        if self == sent { Ok(()) } else { Err(KvError::Damaged { sent, found: self }) }
    }
}

/// The valid rows of a block on their way, with the digest that they had in the memory they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    pub bytes: Bytes,
    pub digest: Digest,
}

impl Payload {
    /// With the digest of `bytes` as they are here.
    pub fn new(bytes: Bytes) -> Payload {
        Payload { digest: Digest::of(&bytes), bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    /// Computed by an independent implementation of the XXH64 specification. Every other one (a GPU kernel)
    /// must give these values for these inputs.
    #[test]
    fn vectors() {
        let expected = [
            (0, 0xef46_db37_51d8_e999u64),
            (1, 0x3697_9d78_f232_250a),
            (36, 0xeaf4_8236_667d_dcfc),
            (4095, 0x0bab_f26a_2348_fb03),
            (4096, 0x0fe2_9263_7c3b_bb4f),
            (4097, 0xc9a0_2d82_81df_53c0),
            (100_000, 0xd2e3_365f_3f19_d9ff),
        ];
        for (count, digest) in expected {
            assert_eq!(Digest::of(&bytes(count)), Digest(digest), "{count} bytes");
        }
    }

    #[test]
    fn a_flipped_bit_and_swapped_leaves_change_it() {
        let sent = bytes(3 * Digest::LEAF + 100);
        let digest = Digest::of(&sent);
        for bit in [0, 8 * Digest::LEAF, 8 * sent.len() - 1] {
            let mut flipped = sent.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Digest::of(&flipped).expect(digest), Err(KvError::Damaged { .. })), "bit {bit}");
        }
        let mut swapped = sent.clone();
        swapped[..2 * Digest::LEAF].rotate_left(Digest::LEAF);
        assert!(Digest::of(&swapped).expect(digest).is_err());
        assert!(Digest::of(&sent[..sent.len() - 1]).expect(digest).is_err());
        assert!(Digest::of(&sent).expect(digest).is_ok());
    }
}
