//! Blocks pass through buffers of megabytes that come and go by the hundred a second. Left to itself glibc gives each back to the
//! kernel, and clearing its pages again costs a quarter of the processor time of a hand-off.

/// Buffers of up to this size come from the heap.
const LARGEST: i32 = 32 << 20;
/// Free memory at the end of a heap beyond which it goes back to the kernel; larger than all buffers of a few deliveries.
const KEPT: i32 = 256 << 20;

/// Has this process keep the memory of such buffers. To be called before there are threads that allocate much.
#[cfg(target_env = "gnu")]
pub fn keep() {
    // SAFETY: both only set a number inside of the allocator.
    let set = unsafe {
        [libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST), libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT)]
    };
    if set.contains(&0) {
        tracing::warn!("the allocator takes no thresholds: the hand-off costs more processor time");
    }
}

/// Other allocators have ways of their own.
#[cfg(not(target_env = "gnu"))]
pub fn keep() {}
