//! What is launched: the [`Backend`] trait at the level of this architecture's fused operations, and
//! its implementations. `cpu` is the specification. Knows no transport, no scheduler, no files.

mod backend;
pub mod batch;
mod check;
pub mod cpu;
pub mod cuda;
mod error;
mod math;
mod random;
mod shape;
mod tensor;
mod timed;

pub use backend::{Backend, Weights};
pub use batch::*;
pub use cpu::CpuBackend;
pub use cuda::CudaBackend;
pub use error::Error;
pub use math::{exp, ln};
pub use random::Random;
pub use shape::{DeviceMemory, GateRule, GraphKey, GroupScore, Scoring, Shape};
pub use tensor::{Data, Dtype, MlaTensors, MlpTensors, QueryTensors, Scales, Tensor};
pub use timed::{OperationTime, Timed};
