//! Leaves hashed on the device against those of the CPU: dense and strided rows, ends within a word, a stripe, a block and a leaf.

use crate::support;
use kernels::cuda::digest::{self, Rows};
use kv::Digest;

/// Layers, valid bytes of each and their distance.
const SHAPES: [(usize, usize, usize); 11] = [
    (1, 4, 4),
    (1, 60, 64),
    (1, 1028, 1028),
    (1, 4092, 4092),
    (1, 4096, 4096),
    (1, 4100, 4100),
    (5, 1156, 2000),
    (7, 2048, 4096),
    (61, 5760, 73_728),
    (1, 100_004, 100_004),
    (61, 73_728, 73_728),
];

#[test]
fn leaves_are_those_of_the_cpu_at_any_length() {
    let Some(device) = support::device() else { return };
    for (layers, width, stride) in SHAPES {
        let bytes: Vec<u8> = (0..layers * stride).map(|i| (i * 31 + i / 251) as u8).collect();
        let block = support::upload(&device, &bytes);
        let rows = Rows { block: block.address(), width, stride, layers };
        let leaves = support::poisoned(&device, 8 * (rows.leaves() + 1));
        digest::leaves(&device, &device.stream, rows, leaves.address()).unwrap();
        device.synchronize().unwrap();
        let found = support::download(&device, &leaves);
        let (found, behind) = found.split_at(8 * rows.leaves());
        let hashes = found.as_chunks::<8>().0.iter().map(|leaf| u64::from_le_bytes(*leaf));
        let expected = Digest::of_parts(bytes.chunks(stride).map(|layer| &layer[..width]));
        assert_eq!(
            Digest::of_leaves(hashes, rows.bytes()),
            expected,
            "{layers} layers of {width} in {stride}"
        );
        assert_eq!(behind, [0xff; 8], "{layers} layers of {width} in {stride}");
    }
}
