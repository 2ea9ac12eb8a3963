//! The OpenAI API as types: requests parsed and checked field by field, responses and stream chunks,
//! errors. Knows nothing of any model, tokenizer or transport: what it accepts is well-formed, no more.

mod chat;
mod completions;
mod error;
mod fields;
mod messages;
mod parameters;
mod reply;
mod unserved;

pub use chat::ChatRequest;
pub use completions::{CompletionRequest, Prompt};
pub use error::{Code, Error};
pub use fields::shorten;
pub use messages::Message;
pub use parameters::{Ending, Limits, MAX_STOP_BYTES, Parameters, Sampling, Streaming};
pub use reply::{
    ChatChoice, ChatChunkChoice, ChatLogprobs, ChatTokenLogprob, CompletionChoice, CompletionLogprobs, Delta,
    Envelope, Model, ModelList, ReplyMessage, StopReason, TopLogprob, TopMap, Usage,
};
