//! API keys: who may ask, in whose name, and how much. The file is read again when it changes; tenants keep their accounts.

mod account;
mod bucket;
mod entry;
mod ring;

pub use account::{Lease, Left, Standing};
pub use entry::{Entry, Limits, NewKey};
pub use ring::{Caller, KeyRing};
