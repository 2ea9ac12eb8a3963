//! What is sent: the messages and services of `*.proto`, the one table that says what each error code
//! means, and how the parts of a token's latency add up. Knows nothing of who sends or why.

// A request is larger than a heartbeat; boxing it would buy nothing.
#![allow(clippy::large_enum_variant)]

tonic::include_proto!("baton.v1");

/// Encoded `FileDescriptorSet` of all services, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Largest gRPC message Baton sends or accepts: one KV block of the real model (4.5 MB) fits with room.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;

mod code;
mod dial;
mod files;
pub mod latency;

pub use dial::Dial;
pub use files::files_fingerprint;
