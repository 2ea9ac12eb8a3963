//! What the bytes of a block are known by: a tree over fixed-size leaves, so that the device that holds them computes it in
//! parallel, both where they leave and where they land. The root takes the leaves in order, so that they cannot change places
//! unnoticed, and then the number of bytes, so that the zeros behind them cannot pass for bytes.
//!
//! `leaf[i] = XXH3-64(bytes[i * 4096 ..][.. 4096])`, zeros standing behind the end in the last one; `digest = XXH64(leaf hashes ‖
//! number of bytes (u64), seed = 0)`, little-endian. Every leaf has the same length, for which alone a device needs XXH3.
//! Both: <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>. Damage goes unnoticed once in 2^64; it is no defence
//! against somebody who forges blocks.

use crate::KvError;
use bytes::Buf;
use std::hash::Hasher;
use twox_hash::{XxHash3_64, XxHash64};

/// Digest of the valid rows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// Bytes of a leaf.
    pub const LEAF: usize = 4096;

    pub fn of(bytes: &[u8]) -> Digest {
        Digest::of_parts([bytes])
    }

    /// Of bytes that lie in several places, one part after the other.
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Digest {
        let mut leaves = Leaves::default();
        parts.into_iter().for_each(|part| leaves.add(part));
        leaves.end()
    }

    /// Of leaves that somebody else has hashed, and the number of bytes in them.
    pub fn of_leaves(leaves: impl IntoIterator<Item = u64>, bytes: usize) -> Digest {
        let mut root = XxHash64::with_seed(0);
        leaves.into_iter().chain([bytes as u64]).for_each(|word| root.write(&word.to_le_bytes()));
        Digest(root.finish())
    }

    /// Whether what landed is what was sent.
    pub fn expect(self, sent: Digest) -> Result<(), KvError> {
        if self == sent { Ok(()) } else { Err(KvError::Damaged { sent, found: self }) }
    }
}

/// Copies in pieces of which each is hashed where it landed while the processor's cache still has it.
#[derive(Default)]
pub struct HashedCopy(Leaves);

impl HashedCopy {
    const PIECE: usize = 16 * Digest::LEAF;

    /// The next bytes of `from`, which has enough of them, into `to`.
    pub fn copy(&mut self, from: &mut impl Buf, to: &mut [u8]) {
        for to in to.chunks_mut(Self::PIECE) {
            from.copy_to_slice(to);
            self.0.add(to);
        }
    }

    /// `from` behind what `to` has.
    pub fn append(&mut self, from: &[u8], to: &mut Vec<u8>) {
        for from in from.chunks(Self::PIECE) {
            let at = to.len();
            to.extend_from_slice(from);
            self.0.add(&to[at..]);
        }
    }

    /// Of all that was copied.
    pub fn digest(self) -> Digest {
        self.0.end()
    }
}

/// Hashes leaves as bytes come; a leaf may begin in one part and end in another.
#[derive(Default)]
struct Leaves {
    hashes: Vec<u64>,
    bytes: usize,
    /// What there is of a leaf that has begun.
    begun: Vec<u8>,
}

impl Leaves {
    fn add(&mut self, part: &[u8]) {
        self.bytes += part.len();
        let part = if self.begun.is_empty() { part } else { self.go_on(part) };
        let (leaves, rest) = part.as_chunks::<{ Digest::LEAF }>();
        self.hashes.extend(leaves.iter().map(|leaf| XxHash3_64::oneshot(leaf)));
        self.go_on(rest);
    }

    /// Takes up to the end of the leaf; what is left.
    fn go_on<'a>(&mut self, part: &'a [u8]) -> &'a [u8] {
        let (now, rest) = part.split_at(part.len().min(Digest::LEAF - self.begun.len()));
        self.begun.extend_from_slice(now);
        if self.begun.len() == Digest::LEAF {
            self.hashes.push(XxHash3_64::oneshot(&self.begun));
            self.begun.clear();
        }
        rest
    }

    fn end(mut self) -> Digest {
        if !self.begun.is_empty() {
            self.go_on(&[0; Digest::LEAF]);
        }
        Digest::of_leaves(self.hashes, self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    /// Computed by an independent implementation of the specification. Every other one (a GPU kernel)
    /// must give these values for these inputs.
    #[test]
    fn vectors() {
        let expected = [
            (0, 0x34c9_6acd_cadb_1bbbu64),
            (1, 0x116a_619f_73f8_9912),
            (36, 0xd354_34ab_aab2_1b89),
            (4095, 0x98e4_b249_06d1_f163),
            (4096, 0x4e84_2f70_63e8_7896),
            (4097, 0x119c_531e_17fd_ba6f),
            (100_000, 0xe21f_387c_15dc_a0f9),
        ];
        for (count, digest) in expected {
            assert_eq!(Digest::of(&bytes(count)), Digest(digest), "{count} bytes");
        }
    }

    #[test]
    fn where_the_parts_begin_does_not_matter() {
        let whole = bytes(3 * Digest::LEAF + 100);
        for part in [1, 7, 1000, Digest::LEAF - 1, Digest::LEAF, Digest::LEAF + 1, 9000] {
            assert_eq!(Digest::of_parts(whole.chunks(part)), Digest::of(&whole), "parts of {part}");
        }
    }

    #[test]
    fn a_hashed_copy_is_a_copy_and_its_digest() {
        let (from, mut to, mut appended) = (bytes(300_000), vec![0; 300_000], Vec::new());
        let (mut copied, mut hashed) = (HashedCopy::default(), HashedCopy::default());
        for part in [0..70_001, 70_001..300_000] {
            copied.copy(&mut &from[part.clone()], &mut to[part.clone()]);
            hashed.append(&from[part], &mut appended);
        }
        assert!(from == to && from == appended);
        assert_eq!((copied.digest(), hashed.digest()), (Digest::of(&from), Digest::of(&from)));
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
        assert_ne!(Digest::of(&[1, 0]), Digest::of(&[1]), "zeros behind the end are bytes too");
        assert!(Digest::of(&sent).expect(digest).is_ok());
    }
}
