//! Logprobs in the two forms that OpenAI has for them.

use crate::answer::Scored;
use crate::text::Vocabulary;
use openai::{ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob, TopMap};

/// `top`: alternatives shown for each token.
pub fn chat(vocabulary: &Vocabulary, tokens: &[Scored], top: usize, as_ids: bool) -> ChatLogprobs {
    let one = |id: u32, logprob: f32| {
        let bytes = vocabulary.piece(id);
        let token = if as_ids { by_id(id) } else { String::from_utf8_lossy(&bytes).into_owned() };
        TopLogprob { token, logprob, bytes }
    };
    let content = tokens.iter().map(|scored| ChatTokenLogprob {
        sampled: one(scored.id, scored.logprob.unwrap_or_default()),
        top_logprobs: scored.top.iter().take(top).map(|(id, logprob)| one(*id, *logprob)).collect(),
    });
    ChatLogprobs { content: content.collect(), refusal: None }
}

/// The sampled token is always among its alternatives, so there may be one more than asked for.
pub fn completions(vocabulary: &Vocabulary, tokens: &[Scored], as_ids: bool) -> CompletionLogprobs {
    let mut lists = CompletionLogprobs::default();
    for scored in tokens {
        let mut top = TopMap::default();
        let sampled = scored.logprob.map(|logprob| (scored.id, logprob));
        for (id, logprob) in scored.top.iter().copied().chain(sampled) {
            top.insert(name(vocabulary, id, as_ids), logprob);
        }
        lists.tokens.push(name(vocabulary, scored.id, as_ids));
        lists.token_logprobs.push(scored.logprob);
        lists.top_logprobs.push(scored.logprob.map(|_| top));
        lists.text_offset.push(scored.offset);
    }
    lists
}

/// Tokens that are not whole characters are told apart by their bytes, in OpenAI's notation.
fn name(vocabulary: &Vocabulary, id: u32, as_ids: bool) -> String {
    if as_ids {
        return by_id(id);
    }
    String::from_utf8(vocabulary.piece(id)).unwrap_or_else(|error| {
        let hex = error.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
        format!("bytes:{}", hex.collect::<String>())
    })
}

fn by_id(id: u32) -> String {
    format!("token_id:{id}")
}
