//! The gateway: HTTP and text on one side, token ids and the router on the other. The only place where
//! text exists. Knows nothing of workers beyond the names the router reports.

mod answer;
mod api;
mod cluster;
mod config;
mod connections;
mod error;
mod gateway;
pub mod keys;
mod model;
mod observe;
mod server;
mod text;

pub use config::{Config, Keys, Limits, Stream, Timeouts};
pub use error::Error;
pub use server::{Server, run};
