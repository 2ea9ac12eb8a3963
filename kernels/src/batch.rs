//! One forward pass as the engine asks for it and as a backend answers: token inputs, positions,
//! block tables, sampling. Host-side and backend-independent.

use std::sync::Arc;

/// Index of a sequence's resident sampler state (history counts, last sampled token) in a backend.
pub type Slot = u32;

/// How the next token is chosen from the logits. Applied in this order (vLLM V1's, engine order):
/// raw logprobs taken; ids outside the tokenizer masked; stop ids masked while below `min_tokens`;
/// `logit_bias` added; repetition, frequency, presence penalties; if `temperature < 1e-5` arg-max (ties: lowest id);
/// else divide by temperature; min_p; top_k (ties at the boundary: lower id first); top_p over the
/// distribution renormalised after top_k (shortest prefix by (p desc, id asc) with mass >= top_p, at least one);
/// arg-max of `z / temperature + gumbel(seed, choice, position, id)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    /// 0: all.
    pub top_k: u32,
    /// >= 1: all.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// Subtracted once from every id that the output contains.
    pub presence_penalty: f32,
    /// Subtracted once for each time the output contains the id.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of ids in prompt or output; 1: off.
    pub repetition_penalty: f32,
    /// (id, addend), ascending ids.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
    pub choice: u32,
    /// `Some(k)`: report the sampled token's logprob and the k largest.
    pub logprobs: Option<u32>,
    /// `Some(k)`: the same for every prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Output tokens before which the ids of `suppress` cannot be sampled.
    pub min_tokens: u32,
    /// eos and stop ids, for `min_tokens`.
    pub suppress: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            choice: 0,
            logprobs: None,
            prompt_logprobs: None,
            min_tokens: 0,
            suppress: Vec::new(),
        }
    }
}

impl Sampling {
    /// Whether the tokens of the sequence change its logits.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Says what a backend would refuse. To be asked before a sequence is admitted: in a step it is too late.
    pub fn check(&self, vocab_size: u32) -> Result<(), String> {
        let finite =
            [self.temperature, self.top_p, self.min_p, self.presence_penalty, self.frequency_penalty];
        if finite.iter().chain(self.logit_bias.iter().map(|(_, bias)| bias)).any(|value| !value.is_finite()) {
            return Err("a sampling parameter is not a finite number".to_string());
        }
        if self.temperature < 0.0 || !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            let (t, r) = (self.temperature, self.repetition_penalty);
            return Err(format!("temperature {t}, repetition_penalty {r}: expected >= 0 and > 0"));
        }
        let biased = self.logit_bias.iter().map(|(id, _)| id);
        match biased.chain(&self.suppress).find(|id| **id >= vocab_size) {
            Some(id) => Err(format!("token id {id} is outside the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }
}

/// Gives a slot its sampler state. `tokens[..prompt_len]` is the prompt, the rest output so far.
#[derive(Clone, Debug)]
pub struct SlotInit {
    pub slot: Slot,
    pub tokens: Arc<[u32]>,
    pub prompt_len: u32,
    pub sampling: Arc<Sampling>,
}

/// Where a row's tokens come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Known on the host: prefill.
    Tokens(Vec<u32>),
    /// One token: the last one sampled for this slot, perhaps by a step still in flight.
    Sampled,
}

/// One sequence's part of a step.
#[derive(Clone, Debug)]
pub struct Entry {
    pub slot: Slot,
    pub input: Input,
    /// Position of the first input token; all before it are in the cache.
    pub start: u32,
    /// Blocks of the sequence, enough for `start + len` tokens.
    pub block_table: Vec<u32>,
    /// Sample a token after the last input token.
    pub sample: bool,
    /// Take logprobs of prompt tokens: for input row i, of the token at `start + i + 1` if known.
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// Targets of the rows of an entry: the token that follows each, `None` where the chunk ends the prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprobs {
    pub top: u32,
    pub targets: Vec<Option<u32>>,
}

impl Entry {
    pub fn len(&self) -> usize {
        match &self.input {
            Input::Tokens(tokens) => tokens.len(),
            Input::Sampled => 1,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One forward pass.
#[derive(Clone, Debug, Default)]
pub struct StepInput {
    pub init: Vec<SlotInit>,
    pub entries: Vec<Entry>,
}

impl StepInput {
    pub fn tokens(&self) -> usize {
        self.entries.iter().map(Entry::len).sum()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    pub token: u32,
    /// Natural log, of the raw logits.
    pub logprob: f32,
    /// 1 + number of tokens with a larger logit.
    pub rank: u32,
}

/// Logprob of one token and the largest beside it (descending; ties: lower id first).
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    pub token: TokenLogprob,
    pub top: Vec<TokenLogprob>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    pub id: u32,
    pub logprobs: Option<Logprobs>,
}

/// What a step gives for one entry, in the order of [`StepInput::entries`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EntryOutput {
    pub sampled: Option<SampledToken>,
    /// (position, logprobs) of prompt tokens.
    pub prompt_logprobs: Vec<(u32, Logprobs)>,
}
