//! One forward pass as the engine asks for it and as a backend answers: token inputs, positions,
//! block tables, sampling. Host-side and backend-independent.

use std::sync::Arc;

/// Most tokens that are listed beside one, sampled or of the prompt.
pub const MAX_LOGPROBS: u32 = 20;
/// Most entries of `logit_bias` of a sequence.
pub const MAX_BIASES: usize = 1024;
/// Most ids that `min_tokens` holds back: as many stop ids as biases, and those that end a sequence by themselves.
pub const MAX_SUPPRESSED: usize = 1088;

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
        self.check_counts()?;
        let biased = self.logit_bias.iter().map(|(id, _)| id);
        match biased.chain(&self.suppress).find(|id| **id >= vocab_size) {
            Some(id) => Err(format!("token id {id} is outside the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// Of lists, whose room in a backend's slots is fixed.
    fn check_counts(&self) -> Result<(), String> {
        let top = self.logprobs.max(self.prompt_logprobs).unwrap_or(0);
        for (what, found, most) in [
            ("logprobs beside each token", top as usize, MAX_LOGPROBS as usize),
            ("entries of logit_bias", self.logit_bias.len(), MAX_BIASES),
            ("stop ids with min_tokens", self.suppress.len(), MAX_SUPPRESSED),
        ] {
            if found > most {
                return Err(format!("{found} {what}, at most {most}"));
            }
        }
        Ok(())
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

    /// Of this entry, which is the step's `entry`-th and begins in its `first_row`.
    fn wanted_logprobs(&self, entry: usize, first_row: u32) -> impl Iterator<Item = WantedLogprob> {
        let asked = self.prompt_logprobs.iter();
        let targets =
            asked.flat_map(|asked| (0..).zip(&asked.targets).map(|(at, target)| (at, asked.top, *target)));
        targets.filter_map(move |(at, top, target)| {
            let (row, position) = (first_row + at, self.start + at);
            target.map(|target| WantedLogprob { entry, row, position, target, top })
        })
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

    /// Every prompt logprob that the step is to take, in the order of its rows.
    pub fn wanted_logprobs(&self) -> Vec<WantedLogprob> {
        let (mut wanted, mut first_row) = (Vec::new(), 0);
        for (index, entry) in self.entries.iter().enumerate() {
            wanted.extend(entry.wanted_logprobs(index, first_row));
            first_row += entry.len() as u32;
        }
        wanted
    }
}

/// A prompt logprob to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WantedLogprob {
    /// Its index in the step.
    pub entry: usize,
    /// Of the step, whose logits are looked at.
    pub row: u32,
    /// Of that row in the sequence; the target's is the next.
    pub position: u32,
    pub target: u32,
    pub top: u32,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tokens: u32, start: u32, prompt_logprobs: Option<PromptLogprobs>) -> Entry {
        let input = Input::Tokens((0..tokens).collect());
        Entry { slot: start, input, start, block_table: vec![], sample: false, prompt_logprobs }
    }

    #[test]
    fn logprobs_are_wanted_where_there_is_a_target() {
        let asked = PromptLogprobs { top: 3, targets: vec![Some(7), None, Some(9)] };
        let entries = vec![entry(2, 0, None), entry(3, 40, Some(asked)), entry(1, 9, None)];
        let wanted = StepInput { init: vec![], entries }.wanted_logprobs();
        let expected = [(2, 40, 7), (4, 42, 9)].map(|(row, position, target)| WantedLogprob {
            entry: 1,
            row,
            position,
            target,
            top: 3,
        });
        assert_eq!(wanted, expected);
    }

    /// On every backend: a limit that only one of them knew would end the worker that has it.
    #[test]
    fn more_than_a_slot_has_room_for_is_refused() {
        let filled = |logprobs, biases: usize, suppressed: usize| Sampling {
            logprobs: Some(logprobs),
            prompt_logprobs: Some(logprobs / 2),
            logit_bias: vec![(1, 1.0); biases],
            suppress: vec![2; suppressed],
            ..Sampling::default()
        };
        assert_eq!(filled(20, 1024, 1088).check(50), Ok(()));
        for (sampling, part) in [
            (filled(21, 0, 0), "21 logprobs beside each token, at most 20"),
            (filled(42, 0, 0), "42 logprobs"),
            (filled(0, 1025, 0), "1025 entries of logit_bias, at most 1024"),
            (filled(0, 0, 1089), "1089 stop ids with min_tokens, at most 1088"),
        ] {
            assert!(sampling.check(50).unwrap_err().contains(part), "{part}");
        }
    }
}
