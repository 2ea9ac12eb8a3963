//! A worker: an engine with a model behind three gRPC services. Prefill computes prompts and delivers their KV
//! blocks, decode reserves, receives and writes answers; engine, cache and process are the same, and only
//! `prefill.rs` and `decode.rs` differ. Knows token ids, never text; joins the membership and leaves it by draining.

mod buffers;
mod call;
mod channels;
mod config;
mod convert;
mod decode;
mod deliveries;
mod error;
mod guard;
pub mod handoff_speed;
mod health;
mod leave;
mod load;
pub mod measure;
mod member;
mod metrics;
mod pool;
mod prefill;
mod probe;
mod reservations;
mod serve;
mod shared;
pub mod simulated;

pub use config::{BACKENDS, Config, GPU_SHARE, Handoff, Liveness, LoadFormat, Role, Transport};
pub use convert::Bounds;
pub use error::Error;
pub use load::{Loaded, OnStep, cuda, engine_config, loaded, nixl};
pub use member::Addresses;
pub use serve::{Place, run, serve};
pub use shared::Identity;
