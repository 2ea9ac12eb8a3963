//! The digest of an offered block: a tree over fixed-size leaves, so that a device computes it in parallel.
//! It covers the valid rows only and binds them to the prefix they stand for, the block's index and the
//! layout, so that a block that arrives intact but in the wrong place is refused too. Knows bytes, not blocks.
//!
//! `leaf[i] = XXH64(payload[i * 4096 ..][.. 4096], seed = i)`, the last leaf being what is left;
//! `root = XXH64(leaf hashes ‖ prefix (u128) ‖ index (u32) ‖ rows (u32) ‖ layout (u64), seed = 0)`, all little-endian.
//! XXH64: <https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>.

use kv::BlockHash;
use xxhash_rust::xxh64::{Xxh64, xxh64};

/// Bytes of a leaf.
pub const LEAF: usize = 4096;

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
    /// Digest of `payload`, the valid rows of the block, as the thing this binding names.
    pub fn digest(&self, payload: &[u8]) -> u64 {
        let mut root = Xxh64::new(0);
        for (index, leaf) in payload.chunks(LEAF).enumerate() {
            root.update(&xxh64(leaf, index as u64).to_le_bytes());
        }
        root.update(&self.prefix.0.to_le_bytes());
        root.update(&self.index.to_le_bytes());
        root.update(&self.rows.to_le_bytes());
        root.update(&self.layout.to_le_bytes());
        root.digest()
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

    fn payload(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| (i * 31 + i / 251) as u8).collect()
    }

    const BINDING: Binding = Binding {
        prefix: BlockHash(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
        index: 3,
        rows: 17,
        layout: 42,
    };

    /// Computed by an independent implementation of the XXH64 specification. Every other one (a GPU kernel)
    /// must give these values for these inputs.
    #[test]
    fn vectors() {
        let expected = [
            (0, 0xfc5b_3ee6_525d_373du64),
            (1, 0x2e51_e7aa_f3a0_e492),
            (4095, 0x1a3d_2a5f_6d99_c4ae),
            (4096, 0x088f_ac6d_3301_a7d5),
            (4097, 0x32e9_d176_b30c_779d),
            (100_000, 0xf868_b01a_f31b_99f2),
        ];
        for (bytes, digest) in expected {
            assert_eq!(BINDING.digest(&payload(bytes)), digest, "{bytes} bytes");
        }
    }

    #[test]
    fn every_part_is_bound() {
        let bytes = payload(10_000);
        let whole = BINDING.digest(&bytes);
        let mut flipped = bytes.clone();
        flipped[9_999] ^= 1;
        assert_ne!(whole, BINDING.digest(&flipped));
        let mut swapped = bytes.clone();
        swapped.rotate_left(LEAF);
        assert_ne!(whole, BINDING.digest(&swapped), "leaves know their place");
        for other in [
            Binding { prefix: BlockHash(1), ..BINDING },
            Binding { index: 4, ..BINDING },
            Binding { rows: 18, ..BINDING },
            Binding { layout: 43, ..BINDING },
        ] {
            assert_ne!(whole, other.digest(&bytes));
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
