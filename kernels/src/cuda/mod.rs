//! The CUDA backend: launchers, each in the twin file of its device code in `kernels/cuda`.

pub mod attention;
pub mod device;
pub mod elementwise;
pub mod gate;
mod graphs;
mod host;
pub mod linear;
pub mod moe;
pub mod sample;
mod scratch;
pub mod step;
mod transfer;
mod weights;

/// Every `extern "C" __global__` that a launcher names; the binary is checked to hold them all when a device is opened.
pub(crate) const KERNELS: &[&str] = &[
    "linear_fp8_8",
    "linear_fp8_16",
    "linear_fp8_32",
    "linear_fp8_64",
    "linear_fp8_128",
    "linear_bf16_8",
    "linear_bf16_16",
    "linear_bf16_32",
    "linear_bf16_64",
    "linear_bf16_128",
    "linear_bf16_f32_8",
    "linear_bf16_f32_16",
    "linear_bf16_f32_32",
    "linear_bf16_f32_64",
    "linear_bf16_f32_128",
    "quantize",
    "moe_count",
    "moe_tiles",
    "moe_place",
    "silu_mul",
    "moe_combine",
    "embed",
    "rms_norm",
    "rotate_query",
    "cache_write",
    "attend_absorbed_16",
    "attend_absorbed_32",
    "attend_absorbed_64",
    "attend_combine",
    "gather_context",
    "attend_direct",
    "gate_route",
    "sample_rows",
    "sample_logprobs",
    "sample_resolve",
];
