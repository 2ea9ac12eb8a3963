//! What the bytes of a block are known by: a tree over fixed-size leaves, so that the device that holds them computes it in
//! parallel, both where they leave and where they land. A leaf knows its place, so that leaves cannot change theirs unnoticed.
//!
//! `leaf[i] = XXH64(bytes[i * 4096 ..][.. 4096], seed = i)`, the last leaf being what is left; `digest = XXH64(leaf hashes,
//! seed = 0)`, little-endian. XXH64: <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>. Damage goes unnoticed
//! once in 2^64; it is no defence against somebody who forges blocks.

use crate::KvError;
use bytes::Buf;
use xxhash_rust::xxh64::{Xxh64, xxh64};

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
    root: Option<Xxh64>,
    count: u64,
    /// The leaf that has begun, and how much of it is there.
    begun: Option<(Xxh64, usize)>,
}

impl Leaves {
    fn add(&mut self, mut part: &[u8]) {
        while !part.is_empty() {
            if self.begun.is_none() && part.len() >= Digest::LEAF {
                let (leaf, rest) = part.split_at(Digest::LEAF);
                self.push(xxh64(leaf, self.count));
                part = rest;
            } else {
                part = self.go_on(part);
            }
        }
    }

    /// Hashes up to the end of the leaf; what is left.
    fn go_on<'a>(&mut self, part: &'a [u8]) -> &'a [u8] {
        let (mut leaf, there) = self.begun.take().unwrap_or_else(|| (Xxh64::new(self.count), 0));
        let (now, rest) = part.split_at(part.len().min(Digest::LEAF - there));
        leaf.update(now);
        match there + now.len() {
            Digest::LEAF => self.push(leaf.digest()),
            there => self.begun = Some((leaf, there)),
        }
        rest
    }

    fn push(&mut self, leaf: u64) {
        self.root.get_or_insert_with(|| Xxh64::new(0)).update(&leaf.to_le_bytes());
        self.count += 1;
    }

    fn end(mut self) -> Digest {
        if let Some((leaf, _)) = self.begun.take() {
            self.push(leaf.digest());
        }
        Digest(self.root.unwrap_or_else(|| Xxh64::new(0)).digest())
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
        assert!(Digest::of(&sent).expect(digest).is_ok());
    }
}
