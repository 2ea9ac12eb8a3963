//! Names of blocks: a block's hash covers its tokens and, through its parent, all before them, so
//! equal hashes mean equal prefixes. 128 bits: a collision would silently serve another's prefix.

use twox_hash::XxHash3_128;

/// Hash of a full block and of everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u128);

impl BlockHash {
    /// The parent of a sequence's first block.
    pub const ROOT: BlockHash = BlockHash(0);

    /// Hash of the block of `tokens` that follows the prefix named `self`.
    pub fn then(self, tokens: &[u32]) -> BlockHash {
        let mut hasher = XxHash3_128::new();
        hasher.write(&self.0.to_le_bytes());
        for token in tokens {
            hasher.write(&token.to_le_bytes());
        }
        BlockHash(hasher.finish_128())
    }
}

/// Hashes of the full blocks of `tokens`, in order; a partial last block has none.
pub fn hash_blocks(tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
    tokens
        .chunks_exact(block_tokens)
        .scan(BlockHash::ROOT, |parent, block| {
            *parent = parent.then(block);
            Some(*parent)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by an independent implementation of the XXH3 specification. Workers of different builds compare these.
    #[test]
    fn vectors() {
        let all: Vec<u32> = (0..64).collect();
        let first = BlockHash::ROOT.then(&all);
        assert_eq!(first, BlockHash(0xf4f8_2385_840f_98f7_98fd_0165_7ccc_215c));
        assert_eq!(first.then(&[1, 2, 3]), BlockHash(0x238c_71a9_fd3d_9dea_af00_bc69_5a1c_3b53));
    }

    #[test]
    fn a_block_is_named_by_everything_before_it() {
        let a = hash_blocks(&[1, 2, 3, 4, 5], 2);
        let b = hash_blocks(&[9, 2, 3, 4], 2);
        assert_eq!(a.len(), 2);
        assert_ne!(a[1], b[1], "same tokens after another prefix are another block");
        assert_eq!(a, hash_blocks(&[1, 2, 3, 4], 2), "a partial block changes nothing");
    }
}
