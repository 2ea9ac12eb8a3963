//! Host memory of the KV pool at an address of its own, which transports may read and write beside the steps. What keeps them
//! apart is who holds a block: an offer's is read and a reservation's is written, and no step touches either meanwhile.

use kv::Region;
use memmap2::MmapMut;
use std::{io, sync::Arc};

/// Zeros in large pages.
pub fn mapped(bytes: usize) -> io::Result<MmapMut> {
    let map = MmapMut::map_anon(bytes)?;
    large_pages(&map);
    Ok(map)
}

/// Pages of 2 MiB where the system has them, for memory that nobody has touched yet: whoever copies blocks, in this process,
/// out of a socket or out of another process's memory, then looks up 512 times fewer addresses.
pub fn large_pages(map: &MmapMut) {
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "the system has no large pages: copies of blocks take longer");
    }
}

/// `f32`s, zero at first; the system provides each page when it is touched.
pub struct HostMemory {
    /// Unmapped when this is dropped.
    _map: MmapMut,
    pointer: *mut f32,
    elements: usize,
}

// SAFETY: plain memory; who may use which part is said above.
unsafe impl Send for HostMemory {}
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// `None` if there is not so much.
    pub fn zeroed(elements: usize) -> Option<HostMemory> {
        let mut map = mapped(elements.checked_mul(4)?.max(4)).ok()?;
        Some(HostMemory { pointer: map.as_mut_ptr().cast(), elements, _map: map })
    }

    pub fn values(&self) -> &[f32] {
        // SAFETY: mapped with this length; zeros are values.
        unsafe { std::slice::from_raw_parts(self.pointer, self.elements) }
    }

    /// # Safety
    /// The caller is the only one in this process that reads or writes the part of it that it uses.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn values_mut(&self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.elements) }
    }

    pub fn region(self: &Arc<Self>) -> Region {
        Region::new(self.pointer as usize, 4 * self.elements, self.clone())
    }
}
