//! What a process takes from the machine beside its network: random bytes, the time, its own number. They are
//! replaced for this binary, so that a seed decides the keys of every hash map, every uuid and every branch
//! of `tokio::select!`, and so that `std::time` shows the simulated time too. Before a simulation begins, the
//! machine's own are given.
//!
//! A simulation has its process to itself and one thread: so both can be plain statics.

use std::{
    cell::Cell,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::time::Instant;

/// 0: no simulation has begun.
static RANDOM: AtomicU64 = AtomicU64::new(0);
static BEGAN: OnceLock<Instant> = OnceLock::new();
/// Seconds since the epoch at which every simulation begins: some day in 2026.
const EPOCH: u64 = 1_790_000_000;

thread_local! {
    /// Nanoseconds shown last, and whether they are being asked for.
    static SHOWN: Cell<(u64, bool)> = const { Cell::new((0, false)) };
}

/// From here on randomness follows from `seed`, and time stands still until [`begin`]: then a runtime built
/// in between agrees with `std::time`. To be called before anything has drawn any.
pub fn seed(seed: u64) {
    RANDOM.store(mix(seed) | 1, Ordering::Relaxed);
}

/// From here on time is that of the runtime that calls this.
pub fn begin() {
    let _ = BEGAN.set(Instant::now());
}

/// Nanoseconds since [`begin`].
pub fn now() -> u64 {
    let Some(began) = BEGAN.get() else { return 0 };
    SHOWN.with(|shown| {
        let (last, asked) = shown.get();
        // Asked by tokio itself, on the way to its own clock.
        if asked {
            return last;
        }
        shown.set((last, true));
        let now = Instant::now().saturating_duration_since(*began).as_nanos() as u64;
        shown.set((now, false));
        now
    })
}

pub fn mix(value: u64) -> u64 {
    let mut x = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream of numbers that follows from a seed.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// `purpose` keeps streams of one seed apart, so that one that draws more does not change the others.
    pub fn new(seed: u64, purpose: &str) -> Self {
        Chance(purpose.bytes().fold(mix(seed), |state, byte| mix(state ^ u64::from(byte))))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// From `low` up to and not including `high`.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low).max(1)
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    pub fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.within(0, choices.len() as u64) as usize]
    }
}

/// In place of the C library's.
///
/// # Safety
/// `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize {
    if RANDOM.load(Ordering::Relaxed) == 0 {
        // SAFETY: the caller's promise, handed on to the kernel.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as isize };
    }
    for at in 0..length {
        let drawn = mix(RANDOM.fetch_add(2, Ordering::Relaxed));
        // SAFETY: within the caller's buffer.
        unsafe { buffer.add(at).write(drawn as u8) };
    }
    length as isize
}

/// In place of the C library's.
///
/// # Safety
/// `time` can be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    if RANDOM.load(Ordering::Relaxed) == 0 {
        // SAFETY: the caller's promise, handed on to the kernel.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as libc::c_int };
    }
    let now = now();
    let (seconds, nanoseconds) = (EPOCH + now / 1_000_000_000, now % 1_000_000_000);
    // SAFETY: the caller's promise.
    unsafe { time.write(libc::timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds as i64 }) };
    0
}

/// In place of the C library's: members tell it each other.
#[unsafe(no_mangle)]
extern "C" fn getpid() -> libc::pid_t {
    match RANDOM.load(Ordering::Relaxed) {
        // SAFETY: asks the kernel for a number.
        0 => unsafe { libc::syscall(libc::SYS_getpid) as libc::pid_t },
        _ => 1,
    }
}
