//! What proves who is who: certificates between services, tokens and files of keys, all read again when they change. Knows
//! nothing of what is served to whom.

mod dial;
mod incoming;
mod tls;
mod token;
mod watched;

pub use incoming::{Incoming, Patience};
pub use telemetry::credentials::Metrics;
pub use tls::{Error, Tls, TlsConfig};
pub use token::{Denied, TokenFile, bearer};
pub use watched::{Contents, follow, read};
