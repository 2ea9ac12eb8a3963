//! Numbers made on the device: the bytes that the CPU makes, at any length, address and order.

use crate::support;
use kernels::{
    Data, Dtype, Random, Tensor,
    cuda::random::{self, View},
};

const RANDOM: Random = Random { key: 0x1234_5678_9abc_def0, std: 0.037 };

#[test]
fn e4m3_bytes_are_those_of_the_cpu() {
    let Some(device) = support::device() else { return };
    for (count, skip) in [(1, 0), (37, 0), (37, 3), (128 * 129, 16), (1_000_003, 1)] {
        let memory = support::poisoned(&device, count + skip + 5);
        random::e4m3(&device, RANDOM, count, memory.address() + skip as u64).unwrap();
        let bytes = support::download(&device, &memory);
        let expected: Vec<u8> = (0..count).map(|index| RANDOM.e4m3(index)).collect();
        assert!(bytes[skip..][..count] == expected, "{count} bytes from {skip}");
        assert!(bytes[..skip].iter().chain(&bytes[skip + count..]).all(|byte| *byte == 0xff), "{count}");
    }
}

#[test]
fn bf16_rows_are_those_of_the_cpu_in_any_order() {
    let Some(device) = support::device() else { return };
    let (heads, nope, value, latent) = (3, 5, 7, 33);
    let (rows, head) = (heads * (nope + value), (nope + value) * latent);
    for dtype in [Dtype::Bf16, Dtype::F8E4m3] {
        let tensor =
            Tensor { name: "w", dtype, rows, cols: latent, data: Data::Random(RANDOM), scales: None };
        let values = tensor.to_f32().unwrap();
        for view in [
            View::whole(rows, latent),
            View { sizes: [heads, latent, nope], first: 0, strides: [head, 1, latent] },
            View { sizes: [heads, value, latent], first: nope * latent, strides: [head, latent, 1] },
        ] {
            let [batch, n, k] = view.sizes;
            let memory = support::poisoned(&device, 2 * batch * n * k);
            random::bf16(&device, RANDOM, dtype == Dtype::F8E4m3, view, memory.address()).unwrap();
            let at = |b: usize, i: usize, j: usize| {
                values[view.first + b * view.strides[0] + i * view.strides[1] + j * view.strides[2]]
            };
            let elements = (0..batch).flat_map(|b| (0..n).flat_map(move |i| (0..k).map(move |j| (b, i, j))));
            let expected: Vec<u8> =
                elements.flat_map(|(b, i, j)| half::bf16::from_f32(at(b, i, j)).to_le_bytes()).collect();
            assert!(support::download(&device, &memory) == expected, "{dtype:?} {view:?}");
        }
    }
}
