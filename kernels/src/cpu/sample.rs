//! From logits to the next token, in the order that [`Sampling`] documents. One row at a time; nothing here depends on
//! other rows.

use super::philox::{LARGEST_NOISE, Noise};
use crate::{
    Logprobs, SampledToken, Sampling, TokenLogprob,
    math::{exp, exp_f32, ln},
};
use std::{cmp::Ordering, collections::HashMap};

/// Below this temperature the largest logit is taken.
const GREEDY: f32 = 1e-5;

/// How often a token occurs in a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub in_prompt: bool,
    pub output: u32,
}

/// Tokens of a sequence, for penalties.
pub type History = HashMap<u32, Count>;

/// A row to sample from.
pub struct Row<'a> {
    /// Raw, of the whole vocabulary.
    pub logits: &'a [f32],
    /// Ids from here on are never sampled nor listed.
    pub tokenizer_size: usize,
    pub sampling: &'a Sampling,
    /// Empty if no penalty is set.
    pub history: &'a History,
    /// Of the token being sampled.
    pub position: u32,
    pub prompt_len: u32,
}

/// The next token, or `None` if the logits are not finite.
pub fn sample(row: &Row<'_>) -> Option<SampledToken> {
    let eligible = &row.logits[..row.tokenizer_size];
    let best = argmax(eligible);
    if !eligible[best].is_finite() {
        return None;
    }
    let id = if row.is_plainly_greedy() { best as u32 } else { row.choose() };
    let logprobs = row.sampling.logprobs.map(|top| logprobs(row.logits, row.tokenizer_size, id, top));
    Some(SampledToken { id, logprobs })
}

/// Logprob of `token` and the `top` largest, of raw logits over the whole vocabulary. Only ids of the tokenizer are ranked and listed.
pub fn logprobs(logits: &[f32], tokenizer_size: usize, token: u32, top: u32) -> Logprobs {
    let normalizer = log_sum_exp(logits);
    let eligible = &logits[..tokenizer_size];
    let value = logits[token as usize];
    let entry = |id: usize, rank: u32| TokenLogprob {
        token: id as u32,
        logprob: (f64::from(logits[id]) - normalizer) as f32,
        rank,
    };
    let largest = largest(eligible, top as usize);
    let rank = |id: usize| 1 + eligible.iter().filter(|other| **other > logits[id]).count() as u32;
    let mut listed: Vec<TokenLogprob> = Vec::with_capacity(largest.len());
    for (index, id) in largest.into_iter().enumerate() {
        // Equal logits share the rank of the first of them.
        let tied =
            listed.last().filter(|last| logits[last.token as usize] == logits[id]).map(|last| last.rank);
        listed.push(entry(id, tied.unwrap_or(index as u32 + 1)));
    }
    debug_assert!(value.is_finite());
    Logprobs { token: entry(token as usize, rank(token as usize)), top: listed }
}

/// Index of the largest value, the first of equals.
fn argmax(values: &[f32]) -> usize {
    let max = values.iter().fold(f32::NEG_INFINITY, |max, value| if *value > max { *value } else { max });
    values.iter().position(|value| *value == max).unwrap_or(0)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, value| if *value > max { *value } else { max });
    let mut sums = [0.0f64; 8];
    for values in logits.chunks(8) {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += f64::from(exp_f32(value - max));
        }
    }
    f64::from(max) + ln(sums.iter().sum())
}

/// Value descending, then id ascending.
fn order(values: &[f32]) -> impl Fn(&usize, &usize) -> Ordering + '_ {
    |a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b))
}

/// Ids of the `count` largest values, descending; ties: lower id first.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..values.len()).collect();
    keep_largest(values, &mut ids, count);
    ids
}

/// Reduces `ids` to those of the `count` largest values, sorted.
fn keep_largest(values: &[f32], ids: &mut Vec<usize>, count: usize) {
    if count < ids.len() {
        ids.select_nth_unstable_by(count, order(values));
        ids.truncate(count);
    }
    ids.sort_unstable_by(order(values));
}

impl Row<'_> {
    fn is_plainly_greedy(&self) -> bool {
        let s = self.sampling;
        s.temperature < GREEDY
            && s.logit_bias.is_empty()
            && self.history.is_empty()
            && !self.below_min_tokens()
    }

    fn below_min_tokens(&self) -> bool {
        self.position.saturating_sub(self.prompt_len) < self.sampling.min_tokens
    }

    fn choose(&self) -> u32 {
        let mut z = self.logits[..self.tokenizer_size].to_vec();
        self.mask_and_bias(&mut z);
        self.penalize(&mut z);
        if self.sampling.temperature < GREEDY {
            return argmax(&z) as u32;
        }
        z.iter_mut().for_each(|z| *z /= self.sampling.temperature);
        let candidates = self.candidates(&z);
        self.draw(&z, candidates)
    }

    fn mask_and_bias(&self, z: &mut [f32]) {
        if self.below_min_tokens() {
            for id in &self.sampling.suppress {
                z.get_mut(*id as usize).into_iter().for_each(|z| *z = f32::NEG_INFINITY);
            }
        }
        for (id, bias) in &self.sampling.logit_bias {
            z.get_mut(*id as usize).into_iter().for_each(|z| *z += bias);
        }
    }

    fn penalize(&self, z: &mut [f32]) {
        let s = self.sampling;
        for (id, count) in self.history {
            let Some(z) = z.get_mut(*id as usize) else { continue };
            *z = if *z > 0.0 { *z / s.repetition_penalty } else { *z * s.repetition_penalty };
            *z -= s.frequency_penalty * count.output as f32;
            *z -= if count.output > 0 { s.presence_penalty } else { 0.0 };
        }
    }

    /// What min_p, top_k and top_p leave, in any order; `None`: everything.
    fn candidates(&self, z: &[f32]) -> Option<Vec<usize>> {
        let s = self.sampling;
        let top_k = if s.top_k == 0 { usize::MAX } else { s.top_k as usize };
        if s.min_p <= 0.0 && top_k >= z.len() && s.top_p >= 1.0 {
            return None;
        }
        let max = z[argmax(z)];
        let mut ids: Vec<usize> = (0..z.len()).filter(|id| exp_f32(z[*id] - max) >= s.min_p).collect();
        if top_k < ids.len() {
            keep_largest(z, &mut ids, top_k);
        }
        if s.top_p < 1.0 {
            keep_mass(z, &mut ids, max, s.top_p);
        }
        Some(ids)
    }

    /// Arg-max of value plus noise; ties: lowest id.
    fn draw(&self, z: &[f32], candidates: Option<Vec<usize>>) -> u32 {
        let noise = Noise { seed: self.sampling.seed, choice: self.sampling.choice, position: self.position };
        let mut best = (f32::NEG_INFINITY, u32::MAX);
        let mut consider = |id: usize| {
            // Most tokens cannot win whatever their noise is.
            if z[id] + LARGEST_NOISE < best.0 {
                return;
            }
            let value = z[id] + noise.of(id as u32);
            if value > best.0 || (value == best.0 && (id as u32) < best.1) {
                best = (value, id as u32);
            }
        };
        consider(argmax(z));
        match candidates {
            Some(ids) => ids.into_iter().for_each(consider),
            None => (0..z.len()).for_each(consider),
        }
        best.1
    }
}

/// Keeps the shortest prefix by (value descending, id ascending) whose share of the mass of `ids` is at least `top_p`.
fn keep_mass(z: &[f32], ids: &mut Vec<usize>, max: f32, top_p: f32) {
    let mass = |id: &usize| exp(f64::from(z[*id] - max));
    ids.sort_unstable();
    let target = f64::from(top_p) * ids.iter().map(mass).sum::<f64>();
    // Sorting a few is enough nearly always.
    let mut count = 256;
    loop {
        let mut head = ids.clone();
        keep_largest(z, &mut head, count);
        let mut sum = 0.0;
        let reached = head.iter().position(|id| {
            sum += mass(id);
            sum >= target
        });
        if reached.is_some() || head.len() == ids.len() {
            head.truncate(reached.map_or(head.len(), |last| last + 1).max(1));
            *ids = head;
            return;
        }
        count *= 8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row<'a>(logits: &'a [f32], sampling: &'a Sampling, history: &'a History) -> Row<'a> {
        Row { logits, tokenizer_size: logits.len(), sampling, history, position: 10, prompt_len: 8 }
    }

    fn chosen(logits: &[f32], sampling: &Sampling) -> u32 {
        sample(&row(logits, sampling, &History::new())).unwrap().id
    }

    fn candidates(z: &[f32], sampling: &Sampling) -> Vec<usize> {
        let mut ids = row(z, sampling, &History::new()).candidates(z).unwrap();
        ids.sort_unstable();
        ids
    }

    fn warm() -> Sampling {
        Sampling { temperature: 1.0, ..Sampling::default() }
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equals_the_lowest_id() {
        assert_eq!(chosen(&[1.0, 3.0, 3.0, 2.0], &Sampling::default()), 1);
        let biased = Sampling { logit_bias: vec![(3, 1.5), (9, 50.0)], ..Sampling::default() };
        assert_eq!(chosen(&[1.0, 3.0, 3.0, 2.0], &biased), 3, "a bias beyond the vocabulary changes nothing");
    }

    #[test]
    fn ids_beyond_the_tokenizer_and_suppressed_ids_are_never_taken() {
        let (history, logits) = (History::new(), [1.0, 2.0, 0.0, 9.0]);
        let sampling =
            Sampling { min_tokens: 3, suppress: vec![1], logprobs: Some(4), ..Sampling::default() };
        let masked = Row { tokenizer_size: 3, ..row(&logits, &sampling, &history) };
        let found = sample(&masked).unwrap();
        assert_eq!(found.id, 0, "2 of 3 tokens are out");
        let listed: Vec<u32> = found.logprobs.unwrap().top.iter().map(|t| t.token).collect();
        assert_eq!(listed, [1, 0, 2], "logprobs are raw, of the tokenizer's ids");
        assert_eq!(sample(&Row { position: 11, ..masked }).unwrap().id, 1, "3 of 3 tokens are out");
    }

    #[test]
    fn penalties_follow_their_definitions() {
        let count = |in_prompt, output| Count { in_prompt, output };
        let history = History::from([(0, count(true, 0)), (1, count(false, 2)), (2, count(true, 1))]);
        let sampling = Sampling {
            repetition_penalty: 2.0,
            frequency_penalty: 0.25,
            presence_penalty: 1.0,
            ..Sampling::default()
        };
        let mut z = [4.0, 4.0, -4.0, 4.0];
        row(&z.clone(), &sampling, &history).penalize(&mut z);
        assert_eq!(z, [2.0, 2.0 - 0.5 - 1.0, -8.0 - 0.25 - 1.0, 4.0]);
    }

    #[test]
    fn top_k_keeps_exactly_k_and_of_equals_the_lower_ids() {
        let sampling = Sampling { top_k: 3, ..warm() };
        assert_eq!(candidates(&[1.0, 5.0, 1.0, 1.0, 2.0], &sampling), [0, 1, 4]);
    }

    #[test]
    fn top_p_keeps_the_shortest_sufficient_prefix_and_at_least_one() {
        let z = [0.1f32, 0.4, 0.1, 0.4].map(f32::ln);
        let kept = |top_p| candidates(&z, &Sampling { top_p, ..warm() });
        assert_eq!(kept(0.0), [1]);
        assert_eq!(kept(0.39), [1]);
        assert_eq!(kept(0.75), [1, 3]);
        assert_eq!(kept(0.85), [0, 1, 3]);
        let after_top_k = Sampling { top_k: 3, top_p: 0.87, ..warm() };
        assert_eq!(
            candidates(&z, &after_top_k),
            [1, 3],
            "0.8 of 0.9 is 0.889: the mass is that of what top_k left"
        );
    }

    #[test]
    fn min_p_is_relative_to_the_largest() {
        let z = [0.5f32, 0.26, 0.24].map(f32::ln);
        assert_eq!(candidates(&z, &Sampling { min_p: 0.5, ..warm() }), [0, 1]);
    }

    #[test]
    fn logprobs_are_normalised_ranked_and_share_ranks_when_equal() {
        let found = logprobs(&[0.0, 1.0, 1.0, -1.0], 4, 0, 3);
        assert_eq!((found.token.token, found.token.rank), (0, 3));
        assert_eq!(found.top.iter().map(|t| (t.token, t.rank)).collect::<Vec<_>>(), [(1, 1), (2, 1), (0, 3)]);
        let sum: f64 = 1.0 + 2.0 * 1f64.exp() + (-1f64).exp();
        assert!((f64::from(found.token.logprob) + sum.ln()).abs() < 1e-6);
    }

    #[test]
    fn frequencies_are_those_of_the_softmax() {
        let z = [0.5f32, 0.3, 0.15, 0.05].map(f32::ln);
        let (sampling, history) = (Sampling { seed: 3, ..warm() }, History::new());
        let mut counts = [0; 4];
        for position in 0..20_000 {
            counts[sample(&Row { position, ..row(&z, &sampling, &history) }).unwrap().id as usize] += 1;
        }
        for (count, expected) in counts.into_iter().zip([10_000.0, 6000.0, 3000.0, 1000.0f64]) {
            assert!((f64::from(count) - expected).abs() < 4.0 * expected.sqrt(), "{counts:?}");
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_not_sampled() {
        assert!(sample(&row(&[f32::NAN; 3], &Sampling::default(), &History::new())).is_none());
        assert!(sample(&row(&[1.0, f32::INFINITY], &warm(), &History::new())).is_none());
    }

    proptest! {
        /// The shortcuts (tokens that cannot win, partial sorting) against the definition.
        #[test]
        fn shortcuts_change_nothing(
            z in prop::collection::vec(-30.0f32..30.0, 600),
            seed: u64, temperature in 0.1f32..20.0, top_k in 0u32..700, top_p in 0.1f32..1.1, min_p in 0.0f32..0.3,
        ) {
            let sampling = Sampling { seed, temperature, top_k, top_p, min_p, ..Sampling::default() };
            prop_assert_eq!(chosen(&z, &sampling), by_definition(&z, &sampling));
        }
    }

    fn by_definition(logits: &[f32], s: &Sampling) -> u32 {
        let z: Vec<f32> = logits.iter().map(|z| z / s.temperature).collect();
        let mut ids: Vec<usize> = (0..z.len()).collect();
        ids.sort_by(order(&z));
        let max = z[ids[0]];
        ids.retain(|id| exp_f32(z[*id] - max) >= s.min_p);
        ids.truncate(if s.top_k == 0 { usize::MAX } else { s.top_k as usize });
        if s.top_p < 1.0 {
            let mass: Vec<f64> = ids.iter().map(|id| exp(f64::from(z[*id] - max))).collect();
            let target = f64::from(s.top_p) * mass.iter().sum::<f64>() * (1.0 - 1e-12);
            let enough = (1..=ids.len()).find(|n| mass[..*n].iter().sum::<f64>() >= target);
            ids.truncate(enough.unwrap_or(ids.len()));
        }
        let noise = Noise { seed: s.seed, choice: s.choice, position: 10 };
        let value = |id: &usize| z[*id] + noise.of(*id as u32);
        ids.into_iter().max_by(|a, b| value(a).total_cmp(&value(b)).then(b.cmp(a))).unwrap() as u32
    }
}
