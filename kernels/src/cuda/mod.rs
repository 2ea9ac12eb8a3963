//! The CUDA backend: launchers, each in the twin file of its device code in `kernels/cuda`.

pub mod device;
mod host;
pub mod step;
mod transfer;
mod weights;

/// Every `extern "C" __global__` that a launcher names; the binary is checked to hold them all when a device is opened.
pub(crate) const KERNELS: &[&str] = &[];
