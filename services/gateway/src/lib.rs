//! The gateway: HTTP and text on one side, token ids and the router on the other. The only place where
//! text exists. Knows nothing of workers beyond what the router reports.

mod answer;
mod api;
mod cluster;
mod config;
mod connections;
mod error;
mod gateway;
mod history;
pub mod keys;
mod looks;
mod model;
mod observe;
mod problems;
mod record;
mod server;
mod stalls;
mod text;
mod unread;

pub use config::{Config, Keys, Limits, Stream, Timeouts};
pub use error::Error;
pub use server::{Server, run};

/// Reads what a gateway reads of a model directory; true if it could serve chat.
pub fn check_model(directory: &std::path::Path) -> Result<bool, Error> {
    Ok(model::Model::load(directory, 0)?.template.is_some())
}
