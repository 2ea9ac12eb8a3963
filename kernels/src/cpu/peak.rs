//! What the FMA units give when nothing else limits them: the measure for everything else.

use super::lanes::{LANES, Lanes, Level, by_level};
use rayon::prelude::*;
use std::{hint::black_box, time::Instant};

/// Independent chains: enough to hide the latency on two units, few enough for the registers.
const ROUNDS: usize = 200_000;

/// GFLOP/s (two per multiply-add) of all threads of the current pool together, best of a few tries.
pub fn peak_gflops(level: Level) -> f64 {
    let threads = rayon::current_num_threads();
    let chains = if level == Level::Avx512 { 12 } else { 6 };
    let flops = 2.0 * (threads * ROUNDS * chains * LANES) as f64;
    let best = (0..20).map(|_| run(level, threads)).fold(f64::INFINITY, f64::min);
    flops / best / 1e9
}

fn run(level: Level, threads: usize) -> f64 {
    let start = Instant::now();
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        let mut result = 0.0;
        // SAFETY: the level was detected.
        unsafe { spin(level, black_box(0.999_9), &mut result) };
        black_box(result);
    });
    start.elapsed().as_secs_f64()
}

by_level! {
    fn spin(factor: f32, result: &mut f32) = spin_kernel, avx512 (12, 0), narrow (6, 0)
}

#[inline(always)]
unsafe fn spin_kernel<L: Lanes, const CHAINS: usize, const UNUSED: usize>(factor: f32, result: &mut f32) {
    // SAFETY: the caller's.
    unsafe {
        let factor = L::splat(factor);
        let mut chains = [L::splat(1.0); CHAINS];
        for _ in 0..ROUNDS {
            for chain in &mut chains {
                *chain = factor.fma(*chain, factor);
            }
        }
        *result = chains.iter().map(|chain| chain.sum()).sum();
    }
}
