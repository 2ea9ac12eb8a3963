//! KV blocks out of the pool and into it, through pinned memory, and their digests on the device.

use crate::support;
use kernels::{Backend, CudaBackend, Shape, Weights};
use kv::{KvError, KvLayout, Payload};

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

fn backend() -> Option<CudaBackend> {
    support::device()?;
    let mut backend = CudaBackend::new(0).unwrap();
    backend.prepare(SHAPE).unwrap();
    Some(backend)
}

/// With the digest that the CPU computes.
fn payload(layout: KvLayout, block: u32, rows: u32) -> Payload {
    let bytes = (0..layout.payload_bytes(rows) as u32).map(|i| (i * 7 + block * 31 + i / 997) as u8);
    Payload::new(bytes.collect::<Vec<u8>>())
}

fn write(backend: &mut CudaBackend, block: u32, rows: u32, payload: Payload) -> Result<(), KvError> {
    let (reply, written) = kv::transfer();
    backend.kv_write(block, rows, payload, reply).unwrap();
    written.blocking_recv().unwrap()
}

fn read(backend: &mut CudaBackend, block: u32, rows: u32) -> Payload {
    let (reply, payload) = kv::transfer();
    backend.kv_read(block, rows, reply).unwrap();
    payload.blocking_recv().unwrap().unwrap()
}

/// More blocks than there are pinned buffers, whole and in part; what was in a block beyond the rows written stays.
#[test]
fn blocks_come_back_as_they_went_in() {
    let Some(mut backend) = backend() else { return };
    let layout = backend.layout();
    let mut enqueued = |block: u32| {
        let (reply, written) = kv::transfer();
        backend.kv_write(block, 64, payload(layout, block, 64), reply).unwrap();
        written
    };
    let writes: Vec<_> = (0..40).map(&mut enqueued).collect();
    writes.into_iter().for_each(|written| written.blocking_recv().unwrap().unwrap());
    for block in [0, 17, 39] {
        assert_eq!(read(&mut backend, block, 64), payload(layout, block, 64));
    }
    write(&mut backend, 17, 5, payload(layout, 90, 5)).unwrap();
    assert_eq!(read(&mut backend, 17, 5), payload(layout, 90, 5));
    let row = layout.payload_bytes(1) / 3;
    let (whole, before) =
        (read(&mut backend, 17, 64).bytes.together(), payload(layout, 17, 64).bytes.together());
    for layer in 0..3 {
        let rest = (layer * 64 + 5) * row..(layer + 1) * 64 * row;
        assert_eq!(whole[rest.clone()], before[rest]);
    }
}

/// Of every number of rows: leaves that end in a layer, between layers, and in part.
#[test]
fn the_device_finds_the_digest_that_the_cpu_finds() {
    let Some(mut backend) = backend() else { return };
    let layout = backend.layout();
    write(&mut backend, 3, 64, payload(layout, 3, 64)).unwrap();
    for rows in 1..=64 {
        let found = read(&mut backend, 3, rows);
        assert_eq!(found, Payload::new(found.bytes.clone()), "{rows} rows");
        write(&mut backend, 4, rows, payload(layout, rows, rows)).unwrap();
    }
}

#[test]
fn a_block_that_lands_otherwise_than_it_was_sent_is_refused() {
    let Some(mut backend) = backend() else { return };
    let layout = backend.layout();
    for (rows, bit) in [(64, 0), (64, 8 * layout.payload_bytes(64) - 1), (7, 8 * 4096 + 3), (1, 13)] {
        let sent = payload(layout, 1, rows);
        let mut bytes = sent.bytes.together().to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let refused = write(&mut backend, 9, rows, Payload { bytes: bytes.into(), ..sent });
        assert!(matches!(refused, Err(KvError::Damaged { .. })), "{rows} rows, bit {bit}: {refused:?}");
    }
    let (one, other) = (payload(layout, 1, 64), payload(layout, 2, 64));
    let swapped = write(&mut backend, 9, 64, Payload { bytes: other.bytes, ..one });
    assert!(matches!(swapped, Err(KvError::Damaged { .. })), "{swapped:?}");
}
