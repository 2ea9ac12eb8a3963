//! A device if there is one, random values, memory that shows what was not written, and the measure of error.

use kernels::Error;
use kernels::cuda::device::{Device, Memory};
use std::sync::OnceLock;

/// The GPU, or `None` after saying why there is none. A backend that fails on a GPU fails the test.
pub fn device() -> Option<Device> {
    static REASON: OnceLock<()> = OnceLock::new();
    match Device::new(0) {
        Ok(device) => Some(device),
        Err(error @ Error::Unavailable(_)) => {
            REASON.get_or_init(|| println!("no parity with CUDA was tested here: {error}"));
            None
        }
        Err(error) => panic!("there is a GPU, but the backend does not start on it: {error}"),
    }
}

/// Uniform in −1..1, the same for the same seed.
pub fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Whole numbers below a bound, the same for the same seed.
pub fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |bound| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    }
}

/// Some of so many rows, the first and the last among them.
pub fn sampled(rows: usize) -> Vec<usize> {
    let mut below = dice(rows as u64);
    let mut some: Vec<usize> = (0..30).map(|_| below(rows)).chain([0, rows - 1]).collect();
    some.sort_unstable();
    some.dedup();
    some
}

pub fn bf16(value: f32) -> f32 {
    half::bf16::from_f32(value).to_f32()
}

/// [`random`], each a value of bf16.
pub fn random_bf16(count: usize, seed: u64) -> Vec<f32> {
    random(count, seed).into_iter().map(bf16).collect()
}

pub fn upload(device: &Device, bytes: &[u8]) -> Memory {
    let memory = device.alloc(bytes.len()).unwrap();
    if !bytes.is_empty() {
        device.upload(bytes, memory.address()).unwrap();
    }
    device.synchronize().unwrap();
    memory
}

pub fn upload_bf16(device: &Device, values: &[f32]) -> Memory {
    let bytes: Vec<u8> = values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    upload(device, &bytes)
}

pub fn upload_f32(device: &Device, values: &[f32]) -> Memory {
    upload(device, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}

pub fn upload_u32(device: &Device, values: &[u32]) -> Memory {
    upload(device, &values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}

/// All bits set: NaN in bf16, f32 and e4m3.
pub fn poisoned(device: &Device, bytes: usize) -> Memory {
    let memory = device.alloc(bytes).unwrap();
    if bytes > 0 {
        device.fill(&memory, 0xff).unwrap();
    }
    memory
}

pub fn download(device: &Device, memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.bytes()];
    device.download(memory.address(), &mut bytes).unwrap();
    bytes
}

pub fn download_bf16(device: &Device, memory: &Memory) -> Vec<f32> {
    let bytes = download(device, memory);
    bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
}

pub fn download_f32(device: &Device, memory: &Memory) -> Vec<f32> {
    download(device, memory).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

pub fn download_u32(device: &Device, memory: &Memory) -> Vec<u32> {
    download(device, memory).as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

/// ‖found − expected‖ / ‖expected‖; NaN where anything is.
pub fn frobenius(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f64::from(*f) - f64::from(*e))).sum();
    let norm: f64 = expected.iter().map(|e| square(f64::from(*e))).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// Prints the relative Frobenius error and demands that it is below `tolerance`.
pub fn assert_close(found: &[f32], expected: &[f32], tolerance: f64, what: &str) {
    let error = frobenius(found, expected);
    println!("parity {what}: {error:.2e}");
    assert!(error < tolerance, "{what}: relative error {error}, expected less than {tolerance}");
}
