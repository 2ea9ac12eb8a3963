//! Pinned host memory, and what passes through it: step metadata up, results down, KV blocks both ways. Copies from and
//! to pinned memory run beside kernels; an event says when one has passed, and nothing is reused before that.

use super::{
    device::{Address, Device, device},
    fault::text,
};
use crate::Error;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use std::sync::Arc;

/// Page-locked host memory.
pub struct Pinned {
    pointer: *mut u8,
    bytes: usize,
    context: Arc<CudaContext>,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Pinned, Error> {
        context.bind_to_thread().map_err(device)?;
        // SAFETY: freed once, by drop; zeroed before it is ever read.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }
            .map_err(|error| Error::Device(format!(
                    "{bytes} bytes of pinned host memory: {}; raise the container's memory limit, or lower block_tokens or \
                     max_step_tokens",
                    text(error)
                )))?
            .cast::<u8>();
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(Pinned { pointer, bytes, context: context.clone() })
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: allocated and initialised with this length; the device writes only between events that are waited for.
        unsafe { std::slice::from_raw_parts(self.pointer, self.bytes) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        // SAFETY: allocated by malloc_host. An error means that the context is lost.
        let _ = unsafe { result::free_host(self.pointer.cast()) };
    }
}

/// A pinned buffer that is filled from the front and emptied as a whole.
pub struct Staging {
    pinned: Pinned,
    used: usize,
}

impl Staging {
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Staging, Error> {
        Ok(Staging { pinned: Pinned::new(context, bytes)?, used: 0 })
    }

    /// Nothing sent earlier may be on its way.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Enqueues a copy of `values` to `to`.
    pub fn send(&mut self, device: &Device, values: &[u32], to: Address) -> Result<(), Error> {
        let bytes = 4 * values.len();
        if bytes == 0 {
            return Ok(());
        }
        let space = self.pinned.bytes_mut().get_mut(self.used..self.used + bytes);
        let space = space.ok_or_else(|| Error::Device("step metadata outgrew its staging".to_string()))?;
        for (space, value) in space.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *space = value.to_le_bytes();
        }
        self.used += bytes;
        copy_up(&device.stream, to, space)
    }
}

/// Enqueues a copy to the device; `from` must stay as it is until the stream has passed it.
pub fn copy_up(stream: &CudaStream, to: Address, from: &[u8]) -> Result<(), Error> {
    // SAFETY: the caller keeps `from` and owns `to`.
    unsafe { result::memcpy_htod_async(to, from, stream.cu_stream()) }.map_err(device)
}

/// Enqueues a copy from the device; `to` must not be looked at before the stream has passed it.
pub fn copy_down(stream: &CudaStream, from: Address, to: &mut [u8]) -> Result<(), Error> {
    if to.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller keeps `to` and owns `from`.
    unsafe { result::memcpy_dtoh_async(to, from, stream.cu_stream()) }.map_err(device)
}

/// An event that is only waited for, never timed.
pub fn event(context: &Arc<CudaContext>) -> Result<CudaEvent, Error> {
    let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
    context.new_event(Some(flags)).map_err(device)
}
