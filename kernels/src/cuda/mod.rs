//! The CUDA backend: weights FP8 or bf16 as the checkpoint has them, activations and KV in bf16, sums in f32. Each family of
//! operations is a file of launchers beside its twin of device code in `kernels/cuda`. One stream; nothing waits for
//! the device but `download`.

pub mod absorb;
pub mod activate;
pub mod attention;
mod backend;
pub mod device;
pub mod digest;
pub mod direct;
pub mod elementwise;
mod fault;
pub mod gate;
mod graphs;
mod host;
pub mod linear;
mod link;
mod memory;
mod mla;
pub mod moe;
pub mod random;
mod rows;
pub mod sample;
mod scratch;
pub mod step;
mod transfer;
mod weights;

pub use link::{LinkRates, link_rates};

use crate::Error;
use device::Device;
use memory::Prepared;

/// One GPU and what is resident on it.
pub struct CudaBackend {
    // Before the device, whose context it needs to be freed.
    prepared: Option<Prepared>,
    device: Device,
}

impl CudaBackend {
    /// The GPU with this number; an error says what is missing: kernels in the binary, a driver, a GPU of an architecture that the
    /// kernels were built for.
    pub fn new(ordinal: usize) -> Result<CudaBackend, Error> {
        Ok(CudaBackend { prepared: None, device: Device::new(ordinal)? })
    }

    fn parts(&mut self) -> Result<(&Device, &mut Prepared), Error> {
        let prepared = self.prepared.as_mut();
        let prepared = prepared.ok_or_else(|| Error::Device("used before prepare".to_string()))?;
        Ok((&self.device, prepared))
    }
}

/// Families and the kernels that their launchers name; the binary is checked to hold them all when a device is opened.
pub(crate) const FAMILIES: &[(&str, &[&str])] = &[
    ("absorb", absorb::KERNELS),
    ("absorbed", attention::ABSORBED_KERNELS),
    ("activate", activate::KERNELS),
    ("attention", attention::KERNELS),
    ("digest", digest::KERNELS),
    ("direct", direct::KERNELS),
    ("elementwise", elementwise::KERNELS),
    ("gate", gate::KERNELS),
    ("linear", linear::KERNELS),
    ("moe", moe::KERNELS),
    ("random", random::KERNELS),
    ("sample", sample::KERNELS),
];
