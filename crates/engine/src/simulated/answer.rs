//! What a simulated model says: logits as a function of the fingerprint of everything before, sampled as on
//! the CPU. [`next_token`] is the definition, from tokens alone; what the executor finds in its blocks must
//! come to the same.

use kernels::{
    Logprobs, SampledToken, Sampling,
    cpu::{self, History, Row},
};

/// Tokens that stand out of the others at each position.
const PEAKS: u64 = 24;
/// Logit of all others: together they are never sampled, but a bias can lift any of them.
const FLOOR: f32 = -20.0;

/// The shape of the answers.
#[derive(Clone, Copy, Debug)]
pub struct Logits {
    pub vocab_size: u32,
    /// Ids from here on are never sampled.
    pub tokenizer_size: u32,
    /// A token that stands out far at one of so many positions, so that answers end as a model's do.
    pub end: Option<(u32, u32)>,
}

pub(super) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The row of `token` behind the row `before` (0 at the beginning): the fingerprint of the prefix that ends
/// with it.
pub(super) fn row(before: u64, position: usize, token: u32) -> u64 {
    mix(before, mix(position as u64 + 1, u64::from(token) + 1))
}

/// The rows of `tokens`, from their beginning.
fn rows(tokens: &[u32]) -> impl Iterator<Item = u64> {
    let with_place = tokens.iter().enumerate();
    with_place.scan(0, |before, (position, &token)| {
        *before = row(*before, position, token);
        Some(*before)
    })
}

/// The token after `tokens`, as the whole cluster must find it.
pub fn next_token(tokens: &[u32], prompt_len: usize, sampling: &Sampling, logits: &Logits) -> SampledToken {
    let found = rows(tokens).fold(0, mix);
    let history = history(tokens, prompt_len, sampling);
    sample(found, &Asked { sampling, history: &history, position: tokens.len(), prompt_len }, logits)
}

/// Logprobs of the prompt token at `position`, of the prefix before it.
pub fn prompt_logprobs(tokens: &[u32], position: usize, top: u32, logits: &Logits) -> Logprobs {
    logprobs(rows(&tokens[..position]).fold(0, mix), tokens[position], top, logits)
}

/// What a token is sampled with, beside the rows of the cache.
pub(super) struct Asked<'a> {
    pub sampling: &'a Sampling,
    pub history: &'a History,
    pub position: usize,
    pub prompt_len: usize,
}

/// `found`: all rows before, folded.
pub(super) fn sample(found: u64, asked: &Asked<'_>, logits: &Logits) -> SampledToken {
    let row = Row {
        logits: &logits.after(found),
        tokenizer_size: logits.tokenizer_size as usize,
        sampling: asked.sampling,
        history: asked.history,
        position: asked.position as u32,
        prompt_len: asked.prompt_len as u32,
    };
    cpu::sample(&row).expect("simulated logits are finite")
}

pub(super) fn logprobs(found: u64, token: u32, top: u32, logits: &Logits) -> Logprobs {
    cpu::logprobs(&logits.after(found), logits.tokenizer_size as usize, token, top)
}

/// Counts, if a penalty asks for them.
pub(super) fn history(tokens: &[u32], prompt_len: usize, sampling: &Sampling) -> History {
    let mut history = History::new();
    if sampling.has_penalties() {
        tokens[..prompt_len].iter().for_each(|token| {
            history.entry(*token).or_default().in_prompt = true;
        });
        tokens[prompt_len..].iter().for_each(|token| count_output(&mut history, *token));
    }
    history
}

pub(super) fn count_output(history: &mut History, token: u32) {
    history.entry(token).or_default().output += 1;
}

impl Logits {
    fn after(&self, found: u64) -> Vec<f32> {
        let mut logits = vec![FLOOR; self.vocab_size as usize];
        for peak in 0..PEAKS {
            let hash = mix(found, peak + 1);
            let id = (hash % u64::from(self.vocab_size)) as usize;
            logits[id] = (hash >> 40) as f32 / (1 << 22) as f32;
        }
        if let Some((id, positions)) = self.end
            && mix(found, 0).is_multiple_of(u64::from(positions.max(1)))
        {
            logits[id as usize] = 20.0;
        }
        logits
    }
}
