//! The CUDA backend: launchers, each in the twin file of its device code in `kernels/cuda`.

pub mod device;
pub mod step;

/// Every `extern "C" __global__` that a launcher names; the binary is checked to hold them all when a device is opened.
pub(crate) const KERNELS: &[&str] = &[];
