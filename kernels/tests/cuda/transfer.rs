//! KV blocks out of the pool and into it, through pinned memory.

use crate::support;
use bytes::Bytes;
use kernels::{Backend, CudaBackend, Shape, Weights};

const SHAPE: Shape = Shape {
    layers: 3,
    vocab: 64,
    tokenizer_size: 64,
    hidden: 128,
    heads: 4,
    nope: 128,
    rope: 64,
    value: 128,
    latent: 512,
    softmax_scale: 1.0,
    rope_frequencies: Vec::new(),
    rope_amplitude: 1.0,
    block_tokens: 64,
    blocks: 40,
    max_sequences: 4,
    max_step_tokens: 16,
    max_context: 128,
};

/// More blocks than there are pinned buffers, whole and in part; what was in a block beyond the rows written stays.
#[test]
fn blocks_come_back_as_they_went_in() {
    if support::device().is_none() {
        return;
    }
    let mut backend = CudaBackend::new(0).unwrap();
    backend.prepare(SHAPE).unwrap();
    let layout = backend.layout();
    let payload = |block: u32, rows: u32| -> Bytes {
        (0..layout.payload_bytes(rows)).map(|i| (i as u32 * 7 + block * 31 + i as u32 / 997) as u8).collect()
    };
    let write = |backend: &mut CudaBackend, block: u32, rows: u32, payload: Bytes| {
        let (reply, written) = kv::transfer();
        backend.kv_write(block, rows, payload, reply);
        written
    };
    let read = |backend: &mut CudaBackend, block: u32, rows: u32| {
        let (reply, bytes) = kv::transfer();
        backend.kv_read(block, rows, reply);
        bytes.blocking_recv().unwrap().unwrap()
    };
    let writes: Vec<_> = (0..40).map(|block| write(&mut backend, block, 64, payload(block, 64))).collect();
    writes.into_iter().for_each(|written| written.blocking_recv().unwrap().unwrap());
    for block in [0, 17, 39] {
        assert_eq!(read(&mut backend, block, 64), payload(block, 64));
    }
    write(&mut backend, 17, 5, payload(90, 5)).blocking_recv().unwrap().unwrap();
    assert_eq!(read(&mut backend, 17, 5), payload(90, 5));
    let row = layout.payload_bytes(1) / 3;
    let (whole, before) = (read(&mut backend, 17, 64), payload(17, 64));
    for layer in 0..3 {
        let rest = (layer * 64 + 5) * row..(layer + 1) * 64 * row;
        assert_eq!(whole[rest.clone()], before[rest]);
    }
}
