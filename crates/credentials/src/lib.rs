//! What proves who is who: files that hold secrets, read again when they change. Knows nothing of what is served to whom.

mod watched;

pub use watched::{Contents, follow, read};
