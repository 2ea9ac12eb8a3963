//! The CUDA backend: launchers, each in the twin file of its device code in `kernels/cuda`.

pub mod attention;
pub mod device;
pub mod elementwise;
mod host;
pub mod step;
mod transfer;
mod weights;

/// Every `extern "C" __global__` that a launcher names; the binary is checked to hold them all when a device is opened.
pub(crate) const KERNELS: &[&str] = &[
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
];
