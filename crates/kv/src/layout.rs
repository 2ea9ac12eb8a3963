//! The shape of a block's bytes. Two workers may exchange blocks only if their layouts are equal,
//! which they check by [`KvLayout::fingerprint`].

use crate::Run;
use twox_hash::XxHash3_64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    Bf16,
}

impl KvDtype {
    pub fn bytes(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
        }
    }
}

/// Block-major pool: a block is `[layers][block_tokens][row]` elements, contiguous. A row is one
/// token's latent (after its norm) followed by its rotary key (after RoPE, adjacent-pair order).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    pub dtype: KvDtype,
    pub layers: u32,
    pub block_tokens: u32,
    /// Elements per token and layer: `kv_lora_rank + qk_rope_head_dim`.
    pub row: u32,
}

impl KvLayout {
    /// Bytes of a whole block.
    pub fn block_bytes(&self) -> usize {
        self.payload_bytes(self.block_tokens)
    }

    /// Bytes of the first `rows` tokens of every layer: what travels for a partial block, layer after layer.
    pub fn payload_bytes(&self, rows: u32) -> usize {
        self.layers as usize * rows as usize * self.row as usize * self.dtype.bytes()
    }

    /// Where the bytes of the first `rows` tokens of every layer lie in a block, in the order in which they travel.
    pub fn runs(&self, rows: u32) -> Vec<Run> {
        if rows == self.block_tokens {
            return vec![Run { at: 0, bytes: self.block_bytes() }];
        }
        let (layer, bytes) =
            (self.block_bytes() / self.layers as usize, self.payload_bytes(rows) / self.layers as usize);
        (0..self.layers as usize).map(|index| Run { at: index * layer, bytes }).collect()
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens as usize)
    }

    /// Equal only for layouts whose bytes mean the same and are known by the same digest. The rotary convention is part of it.
    pub fn fingerprint(&self) -> u64 {
        XxHash3_64::oneshot(format!("mla-latent-then-rope-adjacent-v1 xxh3-leaves-v3 {self:?}").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_block_is_one_run_and_a_partial_one_has_a_run_for_each_layer() {
        let layout = KvLayout { dtype: KvDtype::Bf16, layers: 2, block_tokens: 4, row: 3 };
        assert_eq!(layout.runs(4), [Run { at: 0, bytes: 48 }]);
        assert_eq!(layout.runs(1), [Run { at: 0, bytes: 6 }, Run { at: 24, bytes: 6 }]);
    }

    #[test]
    fn every_part_of_a_layout_counts() {
        let layout = KvLayout { dtype: KvDtype::F32, layers: 5, block_tokens: 64, row: 576 };
        assert_eq!(
            (layout.block_bytes(), layout.payload_bytes(1), layout.blocks_for(65)),
            (737_280, 11_520, 2)
        );
        for other in [
            KvLayout { dtype: KvDtype::Bf16, ..layout },
            KvLayout { layers: 6, ..layout },
            KvLayout { block_tokens: 32, ..layout },
            KvLayout { row: 512, ..layout },
        ] {
            assert_ne!(layout.fingerprint(), other.fingerprint(), "{other:?}");
        }
        // Workers of different builds compare it: it changes only with what it stands for.
        assert_eq!(layout.fingerprint(), 0x9725_496f_86e8_0de1);
    }
}
