//! The KV pool: `[block][layer][token][row]` of f32 in one allocation whose pages the system provides when they are
//! first written.

use super::memory::HostMemory;
use crate::Error;
use kv::{BlockId, Digest, HashedCopy, KvError, KvLayout, Payload, Pieces, Region};
use rayon::prelude::*;
use std::sync::Arc;

pub struct KvPool {
    layout: KvLayout,
    blocks: u32,
    memory: Arc<HostMemory>,
}

impl KvPool {
    pub fn new(layout: KvLayout, blocks: u32) -> Result<KvPool, Error> {
        let too_big =
            || Error::Device(format!("{blocks} KV blocks of {} bytes do not fit", layout.block_bytes()));
        let elements = (layout.block_bytes() / 4).checked_mul(blocks as usize).ok_or_else(too_big)?;
        let memory = HostMemory::zeroed(elements).ok_or_else(too_big)?;
        Ok(KvPool { layout, blocks, memory: Arc::new(memory) })
    }

    fn values(&self) -> &[f32] {
        self.memory.values()
    }

    fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: the pool is borrowed mutably, and transports use only blocks that nobody asks it for meanwhile.
        unsafe { self.memory.values_mut() }
    }

    /// Where it lies.
    pub fn region(&self) -> Region {
        self.memory.region()
    }

    /// Element `index` of the allocation becomes `value(index)`.
    pub fn fill(&mut self, value: impl Fn(usize) -> f32 + Sync) {
        self.values_mut().par_iter_mut().enumerate().for_each(|(index, element)| *element = value(index));
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Elements of a token's row.
    pub fn row(&self) -> usize {
        self.layout.row as usize
    }

    pub fn block_tokens(&self) -> usize {
        self.layout.block_tokens as usize
    }

    /// The rows of one layer of a block.
    pub fn block(&self, block: BlockId, layer: usize) -> &[f32] {
        &self.values()[self.offset(block, layer)..][..self.layer_elements()]
    }

    pub fn row_mut(&mut self, block: BlockId, layer: usize, token: usize) -> &mut [f32] {
        let row = self.row();
        let start = self.offset(block, layer) + token * row;
        &mut self.values_mut()[start..][..row]
    }

    pub fn read(&self, block: BlockId, rows: u32) -> Result<Payload, KvError> {
        let (mut copy, mut bytes) =
            (HashedCopy::default(), Vec::with_capacity(self.layout.payload_bytes(rows)));
        self.layers(block, rows)?.for_each(|layer| copy.append(layer, &mut bytes));
        Ok(Payload { bytes: bytes.into(), digest: copy.digest() })
    }

    /// Of the rows as they lie here.
    pub fn digest(&self, block: BlockId, rows: u32) -> Result<Digest, KvError> {
        Ok(Digest::of_parts(self.layers(block, rows)?))
    }

    /// The bytes of the first `rows` tokens of each layer.
    fn layers(&self, block: BlockId, rows: u32) -> Result<impl Iterator<Item = &[u8]>, KvError> {
        self.check(block)?;
        let elements = self.elements(rows)?;
        let layers = 0..self.layout.layers as usize;
        Ok(layers.map(move |layer| bytes(&self.block(block, layer)[..elements])))
    }

    /// The digest of what lies there afterwards.
    pub fn write(&mut self, block: BlockId, rows: u32, payload: &Pieces) -> Result<Digest, KvError> {
        self.check(block)?;
        let (elements, expected) = (self.elements(rows)?, self.layout.payload_bytes(rows));
        if payload.len() != expected {
            return Err(KvError::WrongLength { rows, expected, found: payload.len() });
        }
        let (mut copy, mut from) = (HashedCopy::default(), payload.reader());
        for layer in 0..self.layout.layers as usize {
            let start = self.offset(block, layer);
            copy.copy(&mut from, bytes_mut(&mut self.values_mut()[start..][..elements]));
        }
        Ok(copy.digest())
    }

    fn check(&self, block: BlockId) -> Result<(), KvError> {
        if block < self.blocks { Ok(()) } else { Err(KvError::NoSuchBlock { block, blocks: self.blocks }) }
    }

    /// Elements of `rows` tokens of one layer.
    fn elements(&self, rows: u32) -> Result<usize, KvError> {
        if rows > self.layout.block_tokens {
            let (expected, found) = (self.layout.block_bytes(), self.layout.payload_bytes(rows));
            return Err(KvError::WrongLength { rows, expected, found });
        }
        Ok(rows as usize * self.row())
    }

    fn layer_elements(&self) -> usize {
        self.block_tokens() * self.row()
    }

    fn offset(&self, block: BlockId, layer: usize) -> usize {
        (block as usize * self.layout.layers as usize + layer) * self.layer_elements()
    }
}

// Payloads are little-endian, and memory is copied as it lies.
const _: () = assert!(cfg!(target_endian = "little"));

fn bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any four bytes of an f32 are bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: and any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv::KvDtype;

    fn pool() -> KvPool {
        KvPool::new(KvLayout { dtype: KvDtype::F32, layers: 2, block_tokens: 4, row: 3 }, 5).unwrap()
    }

    #[test]
    fn a_partial_block_travels_layer_after_layer() {
        let mut from = pool();
        for layer in 0..2 {
            (0..4).for_each(|token| from.row_mut(3, layer, token).fill((10 * layer + token) as f32));
        }
        let payload = from.read(3, 2).unwrap();
        assert_eq!(payload.bytes.len(), from.layout().payload_bytes(2));
        assert_eq!(payload, Payload::new(payload.bytes.clone()));
        let mut to = pool();
        assert_eq!(to.write(1, 2, &payload.bytes).unwrap(), payload.digest);
        assert_eq!(to.digest(1, 2).unwrap(), payload.digest);
        assert_eq!(to.block(1, 1)[..6], [10.0, 10.0, 10.0, 11.0, 11.0, 11.0]);
        assert_eq!(to.block(1, 0)[6..], [0.0; 6], "rows that were not sent stay");
    }

    #[test]
    fn wrong_blocks_and_lengths_are_refused() {
        let mut pool = pool();
        assert!(matches!(pool.read(5, 1), Err(KvError::NoSuchBlock { block: 5, blocks: 5 })));
        assert!(matches!(pool.read(0, 5), Err(KvError::WrongLength { .. })));
        assert!(matches!(
            pool.write(0, 1, &vec![0; 8].into()),
            Err(KvError::WrongLength { expected: 24, found: 8, .. })
        ));
    }
}
