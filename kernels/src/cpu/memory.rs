//! Host memory of the KV pool at an address of its own, which transports may read and write beside the steps. What keeps them
//! apart is who holds a block: an offer's is read and a reservation's is written, and no step touches either meanwhile.

use kv::Region;
use std::{alloc, ptr::NonNull, sync::Arc};

/// Pages begin here, so that a device can register whole ones.
const ALIGN: usize = 4096;

/// `f32`s, zero at first; the system provides each page when it is touched.
pub struct HostMemory {
    pointer: NonNull<f32>,
    elements: usize,
    layout: alloc::Layout,
}

// SAFETY: plain memory; who may use which part is said above.
unsafe impl Send for HostMemory {}
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// `None` if there is not so much.
    pub fn zeroed(elements: usize) -> Option<HostMemory> {
        let bytes = elements.checked_mul(4)?.max(4);
        let layout = alloc::Layout::from_size_align(bytes, ALIGN).ok()?;
        // SAFETY: the size is not 0.
        let pointer = NonNull::new(unsafe { alloc::alloc_zeroed(layout) })?.cast();
        Some(HostMemory { pointer, elements, layout })
    }

    pub fn values(&self) -> &[f32] {
        // SAFETY: allocated and initialised with this length.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.elements) }
    }

    /// # Safety
    /// The caller is the only one in this process that reads or writes the part of it that it uses.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn values_mut(&self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.elements) }
    }

    pub fn region(self: &Arc<Self>) -> Region {
        Region::new(self.pointer.as_ptr() as usize, 4 * self.elements, self.clone())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { alloc::dealloc(self.pointer.as_ptr().cast(), self.layout) }
    }
}
