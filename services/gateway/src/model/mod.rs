//! What the gateway knows of the model: its words, its chat form, its defaults, its ends. No weights.

mod directory;
mod python;
mod strftime;
mod template;

pub use directory::Model;
pub use template::{Conversation, Template};
