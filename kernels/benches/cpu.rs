//! Matrix products of the CPU backend beside what the machine's FMA units can do: `cargo bench -p kernels --bench cpu`.

use kernels::{
    Dtype, Tensor,
    cpu::{Level, Out, Packed, Product, Rows, multiply, peak_gflops},
};
use std::time::{Duration, Instant};

/// (n, k): projections of the demo model, its head, one layer of a larger one.
const SHAPES: [(usize, usize); 4] = [(832, 256), (256, 512), (4096, 256), (2112, 2048)];

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    for threads in [1, threads] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| report(threads));
    }
}

fn report(threads: usize) {
    let level = Level::detect();
    let peak = peak_gflops(level);
    println!("{level:?}, {threads} thread(s): peak {peak:.0} GFLOP/s");
    for (n, k) in SHAPES {
        let line: Vec<String> = [1, 8, 64, 512].into_iter().map(|m| cell(level, m, n, k, peak)).collect();
        println!("  n {n:5} k {k:5}  {}", line.join("  "));
    }
}

fn cell(level: Level, m: usize, n: usize, k: usize, peak: f64) -> String {
    let bytes: Vec<u8> = (0..n * k).flat_map(|i| ((i % 17) as f32 * 0.01).to_le_bytes()).collect();
    let tensor =
        Tensor { name: "w", dtype: Dtype::F32, rows: n, cols: k, data: (&bytes).into(), scales: None };
    let packed = Packed::from_parts(&[tensor]).expect("finite");
    let (x, mut y) = (vec![0.5f32; m * k], vec![0.0f32; m * n]);
    let product = Product { rows: m, x: Rows { values: &x, stride: k }, w: &packed, y: Out::new(&mut y, n) };
    // SAFETY: one product, y is its own.
    let best = shortest(|| unsafe { multiply(level, &[product]) });
    let gflops = 2.0 * (m * n * k) as f64 / best.as_secs_f64() / 1e9;
    let bandwidth = (n * k * 4) as f64 / best.as_secs_f64() / 1e9;
    if m == 1 {
        format!("M=1: {gflops:4.0} ({bandwidth:3.0} GB/s)")
    } else {
        format!("M={m}: {gflops:4.0} ({:2.0} %)", 100.0 * gflops / peak)
    }
}

/// Of as many runs as fit into a quarter of a second: others may use the machine too.
fn shortest(mut run: impl FnMut()) -> Duration {
    let begin = Instant::now();
    let mut best = Duration::MAX;
    while begin.elapsed() < Duration::from_millis(250) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
    }
    best
}
