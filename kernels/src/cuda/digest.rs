//! Launcher of `kernels/cuda/digest.cu`: the leaves of a block's digest, hashed where the block lies.

use super::device::{Address, Args, Device, Grid};
use crate::Error;
use cudarc::driver::CudaStream;
use kv::Digest;

pub(super) const KERNELS: &[&str] = &["digest_leaves"];

/// Threads of a launch's blocks, and of a leaf.
const THREADS: u32 = 32;
const PER_LEAF: u32 = 8;

/// The valid rows of a block: in each layer the first `width` bytes of every `stride`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    pub block: Address,
    pub width: usize,
    pub stride: usize,
    pub layers: usize,
}

impl Rows {
    pub fn bytes(&self) -> usize {
        self.width * self.layers
    }

    /// Of [`Digest::LEAF`], the last one perhaps in part.
    pub fn leaves(&self) -> usize {
        self.bytes().div_ceil(Digest::LEAF)
    }
}

/// What the kernel needs of a layout. To be asked before a pool is made.
pub fn check(token_bytes: usize, block_bytes: usize) -> Result<(), Error> {
    if !token_bytes.is_multiple_of(4) || i32::try_from(block_bytes).is_err() {
        return Err(Error::Unsupported(format!(
            "KV rows of {token_bytes} bytes in blocks of {block_bytes}: the kernels need rows of a multiple of 4 bytes and \
             blocks below 2 GiB; lower the block size"
        )));
    }
    Ok(())
}

/// Enqueues the hashing of every leaf on `stream`, into `leaves`, u64 each.
pub fn leaves(device: &Device, stream: &CudaStream, rows: Rows, leaves: Address) -> Result<(), Error> {
    let threads = rows.leaves() as u32 * PER_LEAF;
    if threads == 0 {
        return Ok(());
    }
    let args = Args::default().ptr(rows.block).u32(rows.width as u32).u32(rows.stride as u32);
    let args = args.u32(rows.layers as u32).ptr(leaves);
    device.launch_on(stream, "digest_leaves", Grid::new([threads.div_ceil(THREADS), 1, 1], THREADS), args)
}
