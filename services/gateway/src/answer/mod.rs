//! An answer being made: the plan of a request, its calls to the router, the choices that grow from them.

mod call;
mod choice;
mod generation;
mod plan;
mod upstream;

pub use choice::{Finish, Scored, Step};
pub use generation::{Event, Generation, Interrupt, Setting};
pub use plan::{Bounds, Plan};
pub use upstream::Upstream;
