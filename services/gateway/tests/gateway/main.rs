//! The gateway over real sockets, against a router that plays a script.

mod answers;
mod client;
mod completions;
mod endings;
mod failures;
mod fake;
mod keys;
mod limits;
mod orders;
mod refusals;
