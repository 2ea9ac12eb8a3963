//! Text and tokens: vocabulary, incremental detokeniser, stop strings. Pure; no clock, no network.

mod detokenizer;
mod stop;
mod vocabulary;

pub use detokenizer::Detokenizer;
pub use stop::StopMatcher;
pub use vocabulary::Vocabulary;
