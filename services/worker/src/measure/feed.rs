//! The steps of a case: sequences over shuffled blocks, prompts of random tokens, decode tokens that the step before sampled.

use super::{BLOCK_TOKENS, Case, Phase};
use kernels::{Entry, Input, Sampling, Shape, SlotInit, StepInput};
use std::sync::Arc;

pub struct Feed {
    case: Case,
    vocab: u32,
    /// Of every sequence.
    tables: Vec<Vec<u32>>,
    sampling: Arc<Sampling>,
    dice: Dice,
}

impl Feed {
    pub fn new(case: &Case, shape: &Shape, seed: u64) -> Feed {
        let mut dice = Dice(seed);
        let mut blocks: Vec<u32> = (0..shape.blocks).collect();
        for last in (1..blocks.len()).rev() {
            blocks.swap(last, dice.below(last as u32 + 1) as usize);
        }
        let each = case.positions().div_ceil(BLOCK_TOKENS) as usize;
        let tables = blocks.chunks_exact(each).take(case.sequences as usize).map(<[u32]>::to_vec).collect();
        Feed { case: *case, vocab: shape.vocab, tables, sampling: Arc::default(), dice }
    }

    pub fn step(&mut self, number: u32) -> StepInput {
        let first = number == 0 || self.case.phase == Phase::Prefill;
        let init =
            if first { (0..self.case.sequences).map(|slot| self.init(slot)).collect() } else { Vec::new() };
        let entries = (0..self.case.sequences).map(|slot| self.entry(slot, number)).collect();
        StepInput { init, entries }
    }

    fn init(&self, slot: u32) -> SlotInit {
        SlotInit { slot, tokens: Arc::new([0]), prompt_len: 1, sampling: self.sampling.clone() }
    }

    fn entry(&mut self, slot: u32, number: u32) -> Entry {
        let (input, start) = match self.case.phase {
            Phase::Prefill => (self.tokens(self.case.tokens), 0),
            Phase::Decode if number == 0 => (self.tokens(1), self.case.start()),
            Phase::Decode => (Input::Sampled, self.case.start() + number),
        };
        let block_table = self.tables[slot as usize].clone();
        Entry { slot, input, start, block_table, sample: true, prompt_logprobs: None }
    }

    fn tokens(&mut self, count: u32) -> Input {
        Input::Tokens((0..count).map(|_| self.dice.below(self.vocab)).collect())
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((((z ^ (z >> 31)) >> 32) * u64::from(end)) >> 32) as u32
    }
}
