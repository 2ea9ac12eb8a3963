//! DeepSeek-family models: what a checkpoint directory must hold, and the forward pass, written once over
//! [`kernels::Backend`]. A directory is checked as a whole before a byte of it is used. Knows no device and no wire.

mod checkpoint;
mod config;
mod directory;
mod error;
mod fingerprint;
mod forward;
mod generation;
mod load;
mod names;
mod pool;
mod random;
mod rope;
mod runner;

pub use config::{Architecture, Config, Moe, Quantization};
pub use directory::{Directory, Stored, check_directory, check_weights};
pub use error::Error;
pub use fingerprint::weights_fingerprint;
pub use generation::GenerationDefaults;
pub use pool::KvSize;
pub use random::{random_directory, random_model};
pub use rope::{Rope, Yarn};
pub use runner::{Launched, Model, ModelRunner, RunnerOptions};
