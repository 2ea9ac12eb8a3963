//! Launcher of `kernels/cuda/absorb.cu`.

use super::device::{Address, Args, Device, Grid};
use crate::{Error, Shape};

pub(super) const KERNELS: &[&str] = &["absorb_rope"];

/// Copies the rotary part of every query, bf16 `[rows][heads][nope + rope]`, to its place in the absorbed form,
/// `[rows][heads][latent + rope]`.
pub fn absorb_rope(
    device: &Device,
    counts: Address,
    rows: u32,
    shape: &Shape,
    query: Address,
    absorbed: Address,
) -> Result<(), Error> {
    let args = Args::default().ptr(counts).ptr(query).u32(shape.heads).u32(shape.nope).u32(shape.rope);
    device.launch("absorb_rope", Grid::new([rows, 1, 1], 256), args.u32(shape.latent).ptr(absorbed))
}
