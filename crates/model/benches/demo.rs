//! The demo model on this machine: load, prefill, decode, memory: `cargo bench -p model --bench demo`.

use kernels::{
    CpuBackend, Entry, Input, Sampling, SlotInit, StepInput,
    cpu::{CpuOptions, Level, peak_gflops},
};
use model::{ModelRunner, RunnerOptions};
use std::{path::Path, sync::Arc, time::Instant};

const TABLE: u32 = 32;

fn main() {
    let threads = std::env::var("THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let options = CpuOptions { threads, ..CpuOptions::default() };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/checkpoint");
    let begin = Instant::now();
    let backend = CpuBackend::new(options).expect("backend");
    let limits =
        RunnerOptions { kv: model::KvSize::Blocks(256), max_sequences: 16, ..RunnerOptions::default() };
    let mut runner = ModelRunner::load(&dir, backend, limits).expect("the demo model");
    println!("loaded in {:.0} ms; {}", begin.elapsed().as_secs_f64() * 1e3, memory());
    let peak = peak_gflops(Level::detect());
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let single = one.install(|| peak_gflops(Level::detect()));
    println!("{:?}, peak {peak:.0} GFLOP/s, of one thread {single:.0}", Level::detect());
    prefill(&mut runner, 512, peak, single);
    for context in [16, 512, 1024, 1900] {
        decode(&mut runner, context, 1);
    }
    decode(&mut runner, 512, 8);
    println!("{}", memory());
}

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| 5 + i * 37 % 4000).collect()
}

fn init(slot: u32, tokens: &[u32]) -> SlotInit {
    let sampling = Arc::new(Sampling::default());
    SlotInit { slot, tokens: tokens.into(), prompt_len: tokens.len() as u32, sampling }
}

fn entry(slot: u32, input: Input, start: usize) -> Entry {
    let block_table = (slot * TABLE..(slot + 1) * TABLE).collect();
    Entry { slot, input, start: start as u32, block_table, sample: true, prompt_logprobs: None }
}

/// Least wall and processor seconds of `times` runs. Processor time tells what the code needs when others use the machine.
fn least(times: usize, mut run: impl FnMut(usize)) -> (f64, f64) {
    let timed = (0..times).map(|index| {
        let (start, used) = (Instant::now(), processor_seconds());
        run(index);
        (start.elapsed().as_secs_f64(), processor_seconds() - used)
    });
    timed.fold((f64::INFINITY, f64::INFINITY), |least, now| (least.0.min(now.0), least.1.min(now.1)))
}

/// Of all threads of this process.
fn processor_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let times = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok());
    times.filter_map(|time| time.split(' ').next()?.parse::<f64>().ok()).sum::<f64>() / 1e9
}

fn step(runner: &mut ModelRunner<CpuBackend>, step: StepInput) {
    let launched = runner.launch(&step).expect("launch");
    runner.finish(launched).expect("finish");
}

fn prefill(runner: &mut ModelRunner<CpuBackend>, length: usize, peak: f64, single: f64) {
    let tokens = prompt(length);
    let (wall, processor) = least(12, |_| {
        let entries = vec![entry(0, Input::Tokens(tokens.clone()), 0)];
        step(runner, StepInput { init: vec![init(0, &tokens)], entries });
    });
    let gflop = 2.0 * macs(length) / 1e9;
    println!(
        "prefill {length}: {:.1} ms, {:.0} tokens/s, {:.0} GFLOP/s, {:.0} % of peak; {:.1} ms on a processor, {:.0} % of one's peak",
        wall * 1e3,
        length as f64 / wall,
        gflop / wall,
        100.0 * gflop / wall / peak,
        processor * 1e3,
        100.0 * gflop / processor / single,
    );
}

/// Multiply-adds of a prompt: weights, absorbed attention, the head once.
fn macs(length: usize) -> f64 {
    let (hidden, heads, latent, row) = (256.0, 4.0, 512.0, 576.0);
    let mla = hidden * (256.0 + row) + 256.0 * heads * 192.0 + heads * 128.0 * latent * 2.0 + 512.0 * hidden;
    let feed_forward = 3.0 * hidden * 512.0 + 4.0 * (3.0 * 5.0 * hidden * 128.0 + 16.0 * hidden);
    let n = length as f64;
    let attention = 5.0 * heads * (row + latent) * n * (n + 1.0) / 2.0;
    n * (5.0 * mla + feed_forward) + attention + 4096.0 * hidden
}

fn decode(runner: &mut ModelRunner<CpuBackend>, context: usize, sequences: u32) {
    for slot in 0..sequences {
        let tokens = prompt(context);
        for (index, chunk) in tokens.chunks(512).enumerate() {
            let init = if index == 0 { vec![init(slot, &tokens)] } else { vec![] };
            let entries = vec![entry(slot, Input::Tokens(chunk.to_vec()), index * 512)];
            step(runner, StepInput { init, entries });
        }
    }
    let mut times = Vec::new();
    for index in 0..100 {
        let entries = (0..sequences).map(|slot| entry(slot, Input::Sampled, context + index)).collect();
        let start = Instant::now();
        step(runner, StepInput { init: vec![], entries });
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    println!(
        "decode, {sequences} sequence(s) of {context}: median {:.2} ms, fastest {:.2} ms, {:.0} tokens/s",
        times[50] * 1e3,
        times[0] * 1e3,
        f64::from(sequences) / times[50]
    );
}

fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let lines = status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("VmRSS"));
    lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
}
