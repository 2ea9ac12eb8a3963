//! A model on the CPU with a tap: logits of every position and the experts of every row.
#![allow(dead_code)] // Each test binary uses a part.

use kernels::{
    CpuBackend, Entry, EntryOutput, Input, PromptLogprobs, Sampling, SlotInit, StepInput,
    cpu::{CpuOptions, Routing, Tapped},
};
use model::{ModelRunner, RunnerOptions};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

pub const OPTIONS: RunnerOptions = RunnerOptions {
    block_tokens: 64,
    kv: model::KvSize::Blocks(64),
    max_sequences: 16,
    max_step_tokens: 1024,
    max_context: None,
    tokenizer_size: None,
};

pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo")
}

#[derive(Default)]
pub struct Heard {
    /// By slot and position.
    pub logits: BTreeMap<(u32, u32), Vec<f32>>,
    /// In the order of the sparse layers, step after step.
    pub routing: Vec<Routing>,
}

pub struct Rig {
    pub runner: ModelRunner<CpuBackend>,
    heard: Arc<Mutex<Heard>>,
}

impl Rig {
    pub fn new(dir: &Path, options: RunnerOptions, cpu: CpuOptions) -> Rig {
        let heard = Arc::new(Mutex::new(Heard::default()));
        let listener = heard.clone();
        let tap = move |tapped: Tapped<'_>| {
            let mut heard = listener.lock().unwrap();
            match tapped {
                Tapped::Routing(routing) => heard.routing.push(routing.clone()),
                Tapped::Logits { slot, position, logits } => {
                    heard.logits.insert((slot, position), logits.to_vec());
                }
            }
        };
        let backend = CpuBackend::new(CpuOptions { tap: Some(Arc::new(tap)), ..cpu }).unwrap();
        Rig { runner: ModelRunner::load(dir, backend, options).unwrap(), heard }
    }

    /// Takes what was heard since the last call.
    pub fn heard(&self) -> Heard {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }

    pub fn step(&mut self, step: StepInput) -> Vec<EntryOutput> {
        let launched = self.runner.launch(&step).unwrap();
        self.runner.finish(launched).unwrap()
    }

    /// Reads `ids` in chunks and samples `count` tokens greedily after them; logits of every position are tapped.
    pub fn run(&mut self, ids: &[u32], table: &[u32], chunk: usize, count: usize) -> Vec<u32> {
        let init = SlotInit {
            slot: 0,
            tokens: ids.into(),
            prompt_len: ids.len() as u32,
            sampling: Arc::new(Sampling::default()),
        };
        let mut init = vec![init];
        let mut sampled = Vec::new();
        for (index, tokens) in ids.chunks(chunk).enumerate() {
            let last = (index + 1) * chunk >= ids.len();
            let mut entry = read(0, tokens, index * chunk, table);
            entry.sample = last && count > 0;
            sampled = self.step(StepInput { init: std::mem::take(&mut init), entries: vec![entry] });
        }
        let mut tokens: Vec<u32> =
            sampled.into_iter().filter_map(|output| output.sampled).map(|t| t.id).collect();
        while tokens.len() < count {
            let entry = next(0, ids.len() + tokens.len() - 1, table);
            let output = self.step(StepInput { init: vec![], entries: vec![entry] });
            tokens.push(output[0].sampled.as_ref().unwrap().id);
        }
        tokens
    }

    /// Answers of the lengths of `answers`, greedily, all prompts in one batch with four blocks each.
    pub fn run_batch(&mut self, prompts: &[Vec<u32>], answers: &[Vec<u32>], longest: usize) -> Vec<Vec<u32>> {
        let table = |slot: usize| (slot as u32 * 4..slot as u32 * 4 + 4).collect::<Vec<u32>>();
        let mut found: Vec<Vec<u32>> = vec![Vec::new(); prompts.len()];
        for round in 0..longest {
            let mut step = StepInput::default();
            let running: Vec<usize> =
                (0..prompts.len()).filter(|slot| answers[*slot].len() > round).collect();
            for slot in &running {
                let (prompt, at) = (&prompts[*slot], *slot as u32);
                if round == 0 {
                    let (tokens, prompt_len) = (prompt.as_slice().into(), prompt.len() as u32);
                    step.init.push(SlotInit { slot: at, tokens, prompt_len, sampling: Arc::default() });
                    let entry = read(at, prompt, 0, &table(*slot));
                    step.entries.push(Entry { sample: true, prompt_logprobs: None, ..entry });
                } else {
                    step.entries.push(next(at, prompt.len() + round - 1, &table(*slot)));
                }
            }
            for (slot, output) in running.into_iter().zip(self.step(step)) {
                found[slot].push(output.sampled.unwrap().id);
            }
        }
        found
    }
}

/// An entry that reads `tokens` and taps the logits after each.
pub fn read(slot: u32, tokens: &[u32], start: usize, table: &[u32]) -> Entry {
    Entry {
        slot,
        input: Input::Tokens(tokens.to_vec()),
        start: start as u32,
        block_table: table.to_vec(),
        sample: false,
        prompt_logprobs: Some(PromptLogprobs { top: 0, targets: vec![Some(0); tokens.len()] }),
    }
}

/// An entry that goes on from what the slot sampled last.
pub fn next(slot: u32, start: usize, table: &[u32]) -> Entry {
    Entry {
        slot,
        input: Input::Sampled,
        start: start as u32,
        block_table: table.to_vec(),
        sample: true,
        prompt_logprobs: None,
    }
}

/// Natural logarithm of the sum of exponentials.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|z| f64::from(z - max).exp()).sum::<f64>().ln()
}
