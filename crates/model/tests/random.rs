//! Models without weight files: the same numbers from the same seed, checked like any other, and runnable.

mod support;

use kernels::{CpuBackend, Entry, Input, Sampling, SlotInit, StepInput, cpu::CpuOptions};
use model::{Error, ModelRunner, RunnerOptions, random_directory};
use std::{path::PathBuf, sync::Arc};

fn config() -> PathBuf {
    support::demo().join("checkpoint/config.json")
}

fn runner(seed: u64) -> ModelRunner<CpuBackend> {
    let options = RunnerOptions { max_step_tokens: 64, ..support::OPTIONS };
    let backend = CpuBackend::new(CpuOptions::default()).unwrap();
    ModelRunner::open(&random_directory(&config(), seed).unwrap(), backend, options).unwrap()
}

/// Next tokens of twelve sequences of one token each.
fn sampled(runner: &mut ModelRunner<CpuBackend>) -> Vec<u32> {
    let sampling = Arc::new(Sampling::default());
    let init = |slot| SlotInit { slot, tokens: Arc::new([slot]), prompt_len: 1, sampling: sampling.clone() };
    let entry = |slot| Entry {
        slot,
        input: Input::Tokens(vec![100 + slot]),
        start: 0,
        block_table: vec![slot],
        sample: true,
        prompt_logprobs: None,
    };
    let step = StepInput { init: (0..4).map(init).collect(), entries: (0..4).map(entry).collect() };
    let launched = runner.launch(&step).unwrap();
    runner.finish(launched).unwrap().into_iter().map(|output| output.sampled.unwrap().id).collect()
}

#[test]
fn a_seed_is_a_model() {
    let (mut one, mut other) = (runner(1), runner(2));
    let tokens = sampled(&mut one);
    assert_eq!(tokens, sampled(&mut runner(1)));
    assert_ne!(tokens, sampled(&mut other));
    assert_eq!(one.model().weights_fingerprint, runner(1).model().weights_fingerprint);
    assert_ne!(one.model().weights_fingerprint, other.model().weights_fingerprint);
    let mut distinct = tokens.clone();
    distinct.dedup();
    assert!(distinct.len() > 1, "different tokens lead to different ones: {tokens:?}");
}

#[test]
fn the_configuration_is_checked_as_with_files() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(config()).unwrap().replace("\"silu\"", "\"gelu\"");
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    let error = random_directory(dir.path(), 1).err().unwrap();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    assert!(matches!(random_directory(&dir.path().join("absent.json"), 1), Err(Error::Io { .. })));
}

#[test]
fn the_models_that_are_measured_have_their_sizes() {
    for (name, layers, experts) in [("slice9", 9, 256), ("ep32", 61, 8)] {
        let path = support::demo().join(format!("../bench/{name}/config.json"));
        let config = random_directory(&path, 1).unwrap().config;
        assert_eq!((config.layers, config.hidden, config.vocab_size), (layers, 7168, 129_280), "{name}");
        assert_eq!(config.moe.map(|moe| (moe.experts, moe.rule.top_k)), Some((experts, 8)), "{name}");
        assert_eq!(config.quantization.map(|fp8| fp8.block), Some([128, 128]), "{name}");
    }
}
