//! Every costly CUDA operation at the sizes of DeepSeek-V3, against the two ceilings of this GPU: time of a call, bytes over
//! time, operations over time, share of the nearer ceiling. Errors against the CPU are what `tests/cuda_parity.rs` prints. Random weights and inputs; more data than the L2 holds wherever the model has it. With an
//! argument `--json FILE` the figures go there too. Without a GPU it says so.

use kernels::cuda::{
    activate::{Quantised, RowScales, Rows, Source, quantize, silu_mul_quantize},
    attention::{absorbed_scratch_bytes, attend_absorbed},
    device::{Address, Device, Memory},
    direct::{self, Heads, Span, attend_direct},
    elementwise::PoolLayer,
    linear::{self, Batch, Input, Matrix, Output, Runs, linear},
    moe,
    step::{Extent, StepAddresses},
};
use std::fmt::Write;

const HIDDEN: u32 = 7168;
const WIDTH: u32 = 2048;
const EXPERTS: u32 = 256;
const TOP_K: u32 = 8;
const HEADS: u32 = 128;
/// Timed calls of each; the median counts.
const CALLS: usize = 15;
/// Operations a second that large products of a library reach on an H200, in 10^12: bf16 and FP8 at 8192 x 8192 x 8192.
const BF16: f64 = 744.0;
const FP8: f64 = 1297.0;

struct Row {
    what: String,
    microseconds: f32,
    bytes: f64,
    operations: f64,
    /// Of tensor cores, for operations of this kind.
    ceiling: f64,
}

impl Row {
    fn gigabytes(&self) -> f64 {
        self.bytes / 1e3 / f64::from(self.microseconds)
    }

    fn teraflops(&self) -> f64 {
        self.operations / 1e6 / f64::from(self.microseconds)
    }

    /// Of the nearer ceiling: `copy` gigabytes a second, or tensor cores.
    fn share(&self, copy: f64) -> f64 {
        (self.gigabytes() / copy).max(self.teraflops() / self.ceiling)
    }
}

struct Bench {
    device: Device,
    noise: Vec<u8>,
    rows: Vec<Row>,
}

fn main() {
    let device = match Device::new(0) {
        Ok(device) => device,
        Err(error) => return println!("nothing was measured: {error}"),
    };
    let mut state = 88172645463325252u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Small e4m3 values, and pairs of them small bf16 values: no NaN, no infinity.
        (state >> 32) as u8 & 0xbf & !0x40 | 0x20
    };
    let noise = (0..64 << 20).map(|_| byte()).collect();
    let mut bench = Bench { device, noise, rows: Vec::new() };
    bench.copy();
    for (name, n, k) in [("q_a + kv_a", 2112, HIDDEN), ("q_b", 24576, 1536), ("o_proj", HIDDEN, 16384)] {
        for rows in [1, 32, 128, 4096, 16384] {
            bench.dense(name, rows, n, k, true);
        }
    }
    for rows in [1, 128] {
        bench.dense("head (bf16)", rows, 129_280, HIDDEN, false);
    }
    for rows in [1, 32, 128, 256, 4096, 16384] {
        bench.experts(rows);
    }
    for (rows, context) in [(1, 4096), (128, 4096), (32, 16384)] {
        bench.absorbed(rows, context);
    }
    for rows in [4096, 16384] {
        bench.direct(rows);
    }
    bench.report(option("--json").as_deref());
}

/// The argument after `name`.
fn option(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

/// Whether the operation is measured: `--only TEXT` leaves out those whose names do not contain the text.
fn wanted(name: &str) -> bool {
    option("--only").is_none_or(|only| name.contains(&only))
}

impl Bench {
    fn random(&self, bytes: usize) -> Memory {
        let memory = self.device.alloc(bytes).unwrap();
        for start in (0..bytes).step_by(self.noise.len()) {
            let length = self.noise.len().min(bytes - start);
            self.device.upload(&self.noise[..length], memory.address() + start as u64).unwrap();
        }
        memory
    }

    fn words(&self, words: &[u32]) -> Memory {
        let memory = self.device.alloc(4 * words.len()).unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.device.upload(&bytes, memory.address()).unwrap();
        memory
    }

    fn scales(&self, count: usize) -> Memory {
        self.words(&vec![0.01f32.to_bits(); count])
    }

    /// Median time of one call, in microseconds.
    fn time(&mut self, what: String, bytes: f64, operations: f64, mut call: impl FnMut(&Device)) {
        call(&self.device);
        let event = || {
            let flags = cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
            self.device.context.new_event(Some(flags)).unwrap()
        };
        let mut times: Vec<f32> = (0..CALLS)
            .map(|_| {
                let (before, after) = (event(), event());
                before.record(&self.device.stream).unwrap();
                call(&self.device);
                after.record(&self.device.stream).unwrap();
                before.elapsed_ms(&after).unwrap() * 1e3
            })
            .collect();
        times.sort_by(f32::total_cmp);
        let ceiling = if what.contains("bf16") || what.contains("attention") { BF16 } else { FP8 };
        self.rows.push(Row { what, microseconds: times[CALLS / 2], bytes, operations, ceiling });
    }

    fn copy(&mut self) {
        let bytes = 4 << 30;
        let [from, to] = [self.random(bytes), self.device.alloc(bytes).unwrap()];
        self.time("copy of 4 GiB, read and written".into(), 2.0 * bytes as f64, 0.0, |device| {
            // SAFETY: two allocations of this size.
            unsafe {
                let stream = device.stream.cu_stream();
                cudarc::driver::result::memcpy_dtod_async(to.address(), from.address(), bytes, stream)
                    .unwrap();
            }
        });
    }

    fn dense(&mut self, name: &str, rows: u32, n: u32, k: u32, fp8: bool) {
        if !wanted(name) {
            return;
        }
        let (cells, element) = ((n * k) as usize, if fp8 { 1 } else { 2 });
        let weights = self.random(cells * element);
        let scales = self.scales(n.div_ceil(128) as usize * (k / 128) as usize);
        let (x, count) = (self.random(2 * (rows * k) as usize), self.words(&[rows]));
        let (q, q_scales) =
            (self.device.alloc((rows * k) as usize).unwrap(), self.scales(((rows + 3) * k / 128) as usize));
        let y = self.device.alloc(4 * rows as usize * n as usize).unwrap();
        let row_scales = RowScales { values: q_scales.address(), pitch: RowScales::pitch(rows) };
        let matrix =
            Matrix { count: 1, weights: weights.address(), scales: fp8.then_some(scales.address()), n, k };
        let values = if fp8 { q.address() } else { x.address() };
        let input = Input { values, scales: fp8.then_some(row_scales), stride: k };
        let output = Output { values: y.address(), stride: n, f32: !fp8 };
        let runs = Runs::Count { count: count.address(), most: rows };
        let bytes = (cells * element) as f64 + 2.0 * f64::from(rows) * f64::from(n + k);
        let operations = 2.0 * f64::from(rows) * cells as f64;
        self.time(format!("{name} {n} x {k}, {rows} rows"), bytes, operations, |device| {
            if fp8 {
                let all = Rows { count: count.address(), per: 1, most: rows };
                let source = Source { values: x.address(), stride: k, row_at: None };
                let to = Quantised { values: q.address(), scales: row_scales };
                quantize(device, all, source, k, to).unwrap();
            }
            linear(device, matrix, input, output, runs, Batch::ONE).unwrap();
        });
    }

    /// Both products of the routed experts with everything between, rows spread evenly at random.
    fn experts(&mut self, rows: u32) {
        if !wanted("experts") {
            return;
        }
        let slots = (rows * TOP_K) as usize;
        let chosen: Vec<u32> = (0..rows)
            .flat_map(|row| (0..TOP_K).map(move |j| (row * 97 + j * 41 + row / 3) % EXPERTS))
            .collect();
        let mut touched = chosen.clone();
        touched.sort_unstable();
        touched.dedup();
        let per_expert = (3 * HIDDEN * WIDTH) as usize;
        let gate_up = self.random(EXPERTS as usize * per_expert / 3 * 2);
        let down = self.random(EXPERTS as usize * per_expert / 3);
        let gate_up_scales = self.scales((EXPERTS * 2 * WIDTH / 128 * HIDDEN / 128) as usize);
        let down_scales = self.scales((EXPERTS * WIDTH / 128 * HIDDEN / 128) as usize);
        let (counts, chosen) = (self.words(&[rows, 0, 0, 0]), self.words(&chosen));
        let weights = self.scales(slots);
        let x = self.random(2 * (rows * HIDDEN) as usize);
        let room = |bytes: usize| self.device.alloc(bytes).unwrap();
        let (q, q_scales) = (room(slots * HIDDEN as usize), room(slots * HIDDEN as usize / 32));
        let both = room(slots * 4 * WIDTH as usize);
        let (inner_q, inner_scales) = (room(slots * WIDTH as usize), room(slots * WIDTH as usize / 32));
        let (results, out) = (room(slots * 2 * HIDDEN as usize), room(2 * (rows * HIDDEN) as usize));
        let scratch = room(moe::scratch_bytes(rows, TOP_K, EXPERTS));
        let tokens = linear::tile(2 * rows * TOP_K / EXPERTS);
        let matrix = |weights: &Memory, scales: &Memory, n, k| Matrix {
            count: EXPERTS,
            weights: weights.address(),
            scales: Some(scales.address()),
            n,
            k,
        };
        let (first, second) = (
            matrix(&gate_up, &gate_up_scales, 2 * WIDTH, HIDDEN),
            matrix(&down, &down_scales, HIDDEN, WIDTH),
        );
        let weights_bytes = (touched.len() * per_expert) as f64;
        let rows_bytes = |width: u32| slots as f64 * f64::from(width);
        let operations = 2.0 * slots as f64 * per_expert as f64;
        let count = counts.address();
        let copies = Rows { count, per: TOP_K, most: rows * TOP_K };
        let quantised = |values: &Memory, scales: &Memory| Quantised {
            values: values.address(),
            scales: RowScales { values: scales.address(), pitch: rows * TOP_K },
        };
        let (to_first, to_second) = (quantised(&q, &q_scales), quantised(&inner_q, &inner_scales));
        let input = |of: Quantised, stride| Input { values: of.values, scales: Some(of.scales), stride };
        let place = |device: &Device| {
            let (chosen, scratch) = (chosen.address(), scratch.address());
            moe::place(device, count, rows, TOP_K, EXPERTS, tokens, chosen, scratch).unwrap()
        };
        let places = place(&self.device);
        let quantised = |device: &Device| {
            let source = Source { values: x.address(), stride: HIDDEN, row_at: Some(places.row_at) };
            quantize(device, copies, source, HIDDEN, to_first).unwrap();
        };
        let gate_up = |device: &Device| {
            let output = Output { values: both.address(), stride: 2 * WIDTH, f32: false };
            linear(device, first, input(to_first, HIDDEN), output, places.runs, Batch::ONE).unwrap();
        };
        let activated =
            |device: &Device| silu_mul_quantize(device, copies, both.address(), WIDTH, to_second).unwrap();
        let down = |device: &Device| {
            let output = Output { values: results.address(), stride: HIDDEN, f32: false };
            linear(device, second, input(to_second, WIDTH), output, places.runs, Batch::ONE).unwrap();
        };
        let combined = |device: &Device| {
            let (results, weights, out) = (results.address(), weights.address(), out.address());
            moe::combine(device, count, rows, TOP_K, results, &places, weights, None, HIDDEN, out).unwrap();
        };
        let what = format!("routed experts, {rows} rows over {} experts", touched.len());
        let all = weights_bytes + rows_bytes(HIDDEN + 8 * WIDTH + 2 * WIDTH + WIDTH + 2 * HIDDEN);
        self.time(what, all, operations, |device| {
            place(device);
            quantised(device);
            gate_up(device);
            activated(device);
            down(device);
            combined(device);
        });
        self.time("- places".into(), 0.0, 0.0, |device| {
            place(device);
        });
        self.time("- gathered and quantised".into(), rows_bytes(3 * HIDDEN), 0.0, quantised);
        let bytes = weights_bytes * 2.0 / 3.0 + rows_bytes(HIDDEN + 4 * WIDTH);
        self.time("- gate and up".into(), bytes, operations * 2.0 / 3.0, gate_up);
        self.time("- activated".into(), rows_bytes(5 * WIDTH), 0.0, activated);
        let bytes = weights_bytes / 3.0 + rows_bytes(WIDTH + 2 * HIDDEN);
        self.time("- down".into(), bytes, operations / 3.0, down);
        self.time("- weighted sum".into(), rows_bytes(2 * HIDDEN), 0.0, combined);
    }

    fn absorbed(&mut self, rows: u32, context: u32) {
        if !wanted("attention") {
            return;
        }
        let blocks = context / 64;
        let pool = self.random((rows * blocks) as usize * 64 * 576 * 2);
        let tables: Vec<u32> = (0..rows * blocks).collect();
        let (counts, entries) =
            (self.words(&[rows, rows, rows, 0]), self.words(&(0..rows).collect::<Vec<_>>()));
        let (positions, tables) = (self.words(&vec![context - 1; rows as usize]), self.words(&tables));
        let step =
            addresses(counts.address(), positions.address(), entries.address(), tables.address(), blocks);
        let query = self.random((rows * HEADS) as usize * 576 * 2);
        let scratch = self.device.alloc(absorbed_scratch_bytes(HEADS, context, rows)).unwrap();
        let out = self.device.alloc((rows * HEADS) as usize * 512 * 2).unwrap();
        let layer =
            PoolLayer { pool: pool.address(), layers: 1, layer: 0, block_tokens: 64, latent: 512, rope: 64 };
        let extent = Extent { rows, entries: rows, samples: 0, decode: true };
        let tokens = f64::from(rows) * f64::from(context);
        let (bytes, operations) = (tokens * 1152.0, tokens * f64::from(HEADS) * 2176.0);
        self.time(
            format!("attention, absorbed, {rows} rows of context {context}"),
            bytes,
            operations,
            |device| {
                let (query, scratch, out) = (query.address(), scratch.address(), out.address());
                attend_absorbed(device, &step, &extent, query, &layer, HEADS, context, 0.135, scratch, out)
                    .unwrap();
            },
        );
    }

    fn direct(&mut self, rows: u32) {
        if !wanted("attention") {
            return;
        }
        direct::check_direct(128, 128).unwrap();
        let per_head = (rows * HEADS) as usize * 128 * 2;
        let (query, k, v) = (self.random(per_head / 2 * 3), self.random(per_head), self.random(per_head));
        let (rope, out) = (self.random(rows as usize * 128), self.device.alloc(per_head).unwrap());
        let pairs = f64::from(rows) * f64::from(rows) / 2.0 * f64::from(HEADS);
        self.time(
            format!("attention, direct, {rows} rows"),
            3.5 * per_head as f64,
            pairs * 640.0,
            |device| {
                let (span, heads) =
                    (Span { first_row: 0, rows, start: 0 }, Heads { first: 0, count: HEADS, all: HEADS });
                let [q, k, v, r, o] = [&query, &k, &v, &rope, &out].map(Memory::address);
                attend_direct(device, span, heads, q, k, v, r, 0.135, o).unwrap();
            },
        );
    }

    fn report(&self, json: Option<&str>) {
        println!("{:<52} {:>10} {:>9} {:>9} {:>7}", "", "µs", "GB/s", "TFLOP/s", "share");
        let (copy, mut lines) = (self.rows[0].gigabytes(), Vec::new());
        for row in &self.rows {
            let Row { what, microseconds, .. } = row;
            let (gigabytes, teraflops, share) = (row.gigabytes(), row.teraflops(), row.share(copy));
            println!("{what:<52} {microseconds:>10.1} {gigabytes:>9.0} {teraflops:>9.1} {share:>7.2}");
            let mut line = String::new();
            write!(line, r#"{{"what": "{what}", "microseconds": {microseconds:.1}, "#).unwrap();
            write!(line, r#""gigabytes_per_second": {gigabytes:.0}, "teraflops": {teraflops:.1}, "#).unwrap();
            write!(line, r#""share_of_ceiling": {share:.2}}}"#).unwrap();
            lines.push(line);
        }
        if let Some(path) = json {
            std::fs::write(path, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
        }
    }
}

fn addresses(
    counts: Address,
    positions: Address,
    entries: Address,
    tables: Address,
    blocks: u32,
) -> StepAddresses {
    StepAddresses {
        counts,
        tokens: 0,
        positions,
        entry_of_row: entries,
        first_row: 0,
        row_count: 0,
        start: 0,
        context: 0,
        slot: 0,
        block_table: tables,
        max_blocks: blocks,
        sample_entry: 0,
        sample_row: 0,
        angles: 0,
    }
}
