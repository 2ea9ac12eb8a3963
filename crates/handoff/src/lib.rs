//! The hand-off of a sequence's KV blocks from a prefill worker to a decode worker: a digest that binds
//! bytes to their place, pure state machines for each side and for the router's view, and drivers that run
//! them over gRPC. Only the receiving worker writes its memory. Knows blocks and messages, neither engine nor device.

pub mod deliver;
pub mod digest;
pub mod direct;
mod error;
mod framing;
mod landing;
pub mod liveness;
pub mod nixl;
pub mod placement;
pub mod receive;
pub mod receiver;
mod replies;
pub mod sender;
pub mod serve;
pub mod transport;
mod unframing;

pub use error::Error;
pub use receiver::{Now, Patience};
