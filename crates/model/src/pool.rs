//! How large the KV pool is, and the steps that a device runs before that can be known: they reserve all scratch memory, so
//! that the pool gets what is left and no later step runs out.

use crate::{Error, ModelRunner, RunnerOptions};
use kernels::{
    Backend, DeviceMemory, Entry, EntryOutput, Input, PromptLogprobs, Sampling, SlotInit, StepInput,
};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvSize {
    Blocks(u32),
    Bytes(u64),
    /// What weights, activations and scratch leave of this share of the device's memory.
    Share(f32),
}

impl KvSize {
    /// Blocks of `block_bytes` each.
    fn blocks(self, memory: Option<DeviceMemory>, block_bytes: usize) -> Result<u32, Error> {
        let blocks = match (self, memory) {
            (KvSize::Blocks(blocks), _) => return Ok(blocks),
            (KvSize::Bytes(bytes), _) => bytes / block_bytes as u64,
            (KvSize::Share(share), Some(memory)) => left(share, memory) / block_bytes as u64,
            (KvSize::Share(_), None) => {
                let what = "needs a device with memory of its own; give kv_blocks or kv_cache_mb";
                return Err(Error::Option { option: "gpu_memory_utilization", what: what.to_string() });
            }
        };
        match u32::try_from(blocks) {
            Ok(blocks @ 1..) => Ok(blocks),
            Ok(0) => Err(self.too_little(memory, block_bytes)),
            Err(_) => Ok(u32::MAX),
        }
    }

    fn too_little(self, memory: Option<DeviceMemory>, block_bytes: usize) -> Error {
        let (option, what) = match (self, memory) {
            (KvSize::Share(share), Some(DeviceMemory { total, free, held })) => (
                "gpu_memory_utilization",
                format!(
                    "{share} of {} MiB leaves no room for one KV block of {block_bytes} bytes: weights, activations \
                     and scratch take {} MiB, and {} MiB are free; raise it, lower max_step_tokens, max_sequences or \
                     max_context, or stop what else uses the GPU",
                    total >> 20,
                    held >> 20,
                    free >> 20
                ),
            ),
            (size, _) => ("kv_cache_mb", format!("{size:?} holds no block of {block_bytes} bytes; raise it")),
        };
        Error::Option { option, what }
    }

    pub(crate) fn check(self) -> Result<(), Error> {
        match self {
            KvSize::Blocks(0) => {
                Err(Error::Option { option: "blocks", what: "0, must be at least 1".to_string() })
            }
            KvSize::Share(share) if !(share > 0.0 && share <= 1.0) => {
                let what = format!("{share}, expected a share above 0 and up to 1");
                Err(Error::Option { option: "gpu_memory_utilization", what })
            }
            _ => Ok(()),
        }
    }
}

/// Bytes that others hold are taken from what is free, not from the share.
fn left(share: f32, memory: DeviceMemory) -> u64 {
    let share = (f64::from(share) * memory.total as f64) as u64;
    share.saturating_sub(memory.held as u64).min(memory.free as u64)
}

/// Blocks that the first steps need.
pub(crate) fn first_blocks(options: &RunnerOptions, max_context: u32) -> u32 {
    options.max_step_tokens.min(max_context).div_ceil(options.block_tokens)
}

impl<B: Backend> ModelRunner<B> {
    /// Gives the pool its size.
    pub(crate) fn size_pool(&mut self, size: KvSize) -> Result<(), Error> {
        if self.backend.memory()?.is_some() {
            self.run_first_steps()?;
        }
        let blocks = size.blocks(self.backend.memory()?, self.layout().block_bytes())?;
        self.backend.resize_pool(blocks)?;
        self.shape.blocks = blocks;
        Ok(())
    }

    /// The largest prompt chunk with a prompt logprob, and the largest decode step. Their results do not matter.
    fn run_first_steps(&mut self) -> Result<(), Error> {
        let shape = self.shape.clone();
        let tokens = shape.max_step_tokens.min(shape.max_context);
        let blocks: Vec<u32> = (0..shape.blocks).collect();
        let mut targets = vec![None; tokens as usize];
        targets[0] = Some(0);
        self.run_first(Entry {
            slot: 0,
            input: Input::Tokens((0..tokens).map(|token| token % shape.vocab).collect()),
            start: 0,
            block_table: blocks.clone(),
            sample: true,
            prompt_logprobs: Some(PromptLogprobs { top: 0, targets }),
        })?;
        self.run_first(Entry {
            slot: 0,
            input: Input::Tokens(vec![0]),
            start: 0,
            block_table: blocks,
            sample: true,
            prompt_logprobs: None,
        })
    }

    fn run_first(&mut self, entry: Entry) -> Result<(), Error> {
        let init = SlotInit {
            slot: entry.slot,
            tokens: Arc::new([0]),
            prompt_len: 1,
            sampling: Arc::new(Sampling::default()),
        };
        let launched = self.launch(&StepInput { init: vec![init], entries: vec![entry] })?;
        let _: Vec<EntryOutput> = self.finish(launched)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: DeviceMemory = DeviceMemory { total: 1000 << 20, free: 600 << 20, held: 300 << 20 };

    fn blocks(size: KvSize, memory: Option<DeviceMemory>) -> Result<u32, String> {
        size.blocks(memory, 1 << 20).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pool_takes_what_its_share_leaves() {
        assert_eq!(blocks(KvSize::Share(0.5), Some(MEMORY)), Ok(200));
        assert_eq!(blocks(KvSize::Share(1.0), Some(MEMORY)), Ok(600), "others hold 100 MiB");
        assert_eq!(blocks(KvSize::Bytes((7 << 20) + 5), None), Ok(7));
        assert_eq!(blocks(KvSize::Blocks(3), Some(MEMORY)), Ok(3));
    }

    #[test]
    fn too_little_memory_is_said_with_its_numbers() {
        let error = blocks(KvSize::Share(0.3), Some(MEMORY)).unwrap_err();
        for part in ["gpu_memory_utilization", "1000 MiB", "300 MiB", "600 MiB", "max_step_tokens"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(blocks(KvSize::Bytes(9), None).unwrap_err().contains("kv_cache_mb"));
        assert!(blocks(KvSize::Share(0.9), None).unwrap_err().contains("kv_blocks"));
        assert!(KvSize::Share(1.5).check().is_err() && KvSize::Blocks(0).check().is_err());
    }
}
