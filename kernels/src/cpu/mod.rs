//! The CPU backend: the specification. f32 throughout, weights kept as f32 after dequantisation, FMA and fixed reduction
//! orders, so that a row's bits depend on its own sequence only. An operation has run when its call returns.

mod attention;
mod backend;
mod direct;
mod elementwise;
mod feed_forward;
mod gate;
mod lanes;
mod matrix;
mod memory;
mod mla;
mod peak;
mod philox;
mod pool;
mod rounding;
mod sample;
mod step;

pub use feed_forward::Linear;
pub use gate::{Routing, route};
pub use lanes::Level;
pub use matrix::{Out, Packed, Product, Rows, multiply};
pub use memory::{large_pages, mapped};
pub use peak::peak_gflops;
pub(crate) use philox::philox;
pub use rounding::{Rounding, e4m3_round};
pub use sample::{Count, History, Row, logprobs, sample};
pub use step::Step;

use crate::{Error, Shape};
use lanes::LANES;
use pool::KvPool;
use std::sync::Arc;
use step::Slots;

/// Which form of attention rows take. Serving is [`MlaForm::Absorbed`]; the other is slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MlaForm {
    #[default]
    Absorbed,
    Direct,
}

/// What a test may listen to while a step runs. Rows and positions in the order of the step.
pub enum Tapped<'a> {
    /// Of one sparse layer; layers come in order.
    Routing(&'a Routing),
    /// Of the token at `position` of the sequence in `slot`, raw.
    Logits { slot: u32, position: u32, logits: &'a [f32] },
}

pub type Tap = Arc<dyn Fn(Tapped<'_>) + Send + Sync>;

#[derive(Clone, Default)]
pub struct CpuOptions {
    /// 0: as many as there are cores.
    pub threads: usize,
    pub rounding: Rounding,
    pub form: MlaForm,
    /// The best that the machine has, if absent. The result is the same.
    pub level: Option<Level>,
    pub tap: Option<Tap>,
}

pub struct CpuBackend {
    options: CpuOptions,
    level: Level,
    threads: Arc<rayon::ThreadPool>,
    /// Present from `prepare` on.
    prepared: Option<Prepared>,
}

struct Prepared {
    shape: Shape,
    pool: KvPool,
    slots: Slots,
    scratch: Scratch,
}

/// What one operation computes on the way.
#[derive(Default)]
struct Scratch {
    /// `[T][rank or hidden → …]`: low-rank query and cache row before norms.
    low: Vec<f32>,
    normed: Vec<f32>,
    /// `[T][heads][latent + rope]`.
    absorbed: Vec<f32>,
    /// `[T][heads × latent]`.
    summed: Vec<f32>,
}

/// Activations.
pub struct Buffer {
    values: Vec<f32>,
    width: usize,
}

impl Buffer {
    /// All rows, those that no step has used too.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    fn rows(&self, rows: usize) -> &[f32] {
        &self.values[..rows * self.width]
    }

    fn rows_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.values[..rows * self.width]
    }
}

pub struct Table {
    values: Vec<f32>,
    width: usize,
}

/// Experts in the order of their ids: gate over up, and down.
pub struct Experts(Vec<(Linear, Linear)>);

pub struct Mla {
    query: Query,
    /// Rows: (low-rank query,) latent, rope.
    low: Linear,
    kv_norm: Vec<f32>,
    eps: f32,
    /// Per head: W_UK as a map from nope to latent.
    key: Vec<Packed>,
    /// Per head: W_UV, latent to value.
    value: Vec<Packed>,
}

enum Query {
    Direct(Linear),
    LowRank { norm: Vec<f32>, b: Linear },
}

impl CpuBackend {
    pub fn new(options: CpuOptions) -> Result<CpuBackend, Error> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|index| format!("cpu-{index}"))
            .build()
            .map_err(|e| Error::Device(e.to_string()))?;
        let level = options.level.unwrap_or_else(Level::detect);
        if !Level::available().contains(&level) {
            return Err(Error::Unsupported(format!("this machine has no {level:?}")));
        }
        Ok(CpuBackend { options, level, threads: Arc::new(threads), prepared: None })
    }

    fn prepared(&mut self) -> Result<&mut Prepared, Error> {
        self.prepared.as_mut().ok_or_else(|| Error::Device("used before prepare".to_string()))
    }
}

/// Grows `buffer` to `length`; what it holds is unspecified.
fn grow(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        buffer.resize(length.next_multiple_of(LANES), 0.0);
    }
    &mut buffer[..length]
}
