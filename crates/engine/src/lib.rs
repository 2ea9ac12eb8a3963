//! The engine of a worker: sequences, continuous batching, chunked prefill, prefix cache, preemption,
//! over an [`Executor`] that runs the steps: a model, or a simulation of one. A synchronous state machine (`core`) inside a small
//! asynchronous driver; services talk to it through [`EngineHandle`]. Knows no gRPC, no etcd, no text.

mod config;
mod core;
mod driver;
mod executor;
mod handle;
mod model_executor;
pub mod policy;
mod sequence;
pub mod simulated;
#[cfg(test)]
mod tests;

pub use config::{EngineConfig, Role, StepKind, StepRecord};
pub use core::SequenceId;
pub use driver::{drive, spawn};
pub use executor::{Executor, ExecutorError, Limits, StepOutput};
pub use handle::{EngineHandle, Offers, Quarantine, Reservation, Running};
pub use model_executor::ModelExecutor;
pub use sequence::{Computed, ComputedBlock, EngineLoad, Event, Finish, FirstToken, Refused, SequenceSpec};
