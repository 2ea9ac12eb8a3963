//! Small random checkpoints of the V2-Lite and Kimi-K2 kinds against Hugging Face transformers. `fixtures/make.py` makes
//! them and says how.

mod support;

use kernels::cpu::CpuOptions;
use model::Architecture;
use serde_json::Value;
use std::{fs, path::Path};
use support::{OPTIONS, Rig};
use tempfile::TempDir;

const TOLERANCE: f32 = 1e-3;

/// A copy of the fixture, with the tokenizer that a model directory needs and this test does not.
fn fixture(name: &str) -> (TempDir, Value) {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let files = fs::read_dir(&committed)
        .unwrap_or_else(|e| panic!("{}: {e}; fixtures/make.py makes it", committed.display()));
    let dir = tempfile::tempdir().unwrap();
    for file in files.map(|file| file.unwrap()) {
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let expected = fs::read_to_string(committed.join("expected.json")).unwrap();
    (dir, serde_json::from_str(&expected).unwrap())
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn check(name: &str) -> Rig {
    let (dir, expected) = fixture(name);
    let options = model::RunnerOptions { max_context: Some(256), ..OPTIONS };
    let mut rig = Rig::new(dir.path(), options, CpuOptions::default());
    let prompts = expected["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 3);
    for prompt in prompts {
        let (tokens, table) = (ids(&prompt["ids"]), [7, 5, 3, 1]);
        rig.run(&tokens, &table, 1024, 0);
        compare(&rig, name, prompt);
        let (greedy, margins) = (ids(&prompt["greedy"]), prompt["margins"].as_array().unwrap());
        let found = rig.run(&tokens, &table, 16, greedy.len());
        let demanded = margins.iter().take_while(|margin| margin.as_f64().unwrap() > 0.01).count();
        assert_eq!(found[..demanded], greedy[..demanded], "{name}");
        rig.heard();
    }
    rig
}

fn compare(rig: &Rig, name: &str, prompt: &Value) {
    let heard = rig.heard();
    let mut worst = 0.0f32;
    for (position, row) in prompt["logits"].as_array().unwrap().iter().enumerate() {
        let found = &heard.logits[&(0, position as u32)];
        assert_eq!(row.as_array().unwrap().len(), found.len());
        let pairs = row.as_array().unwrap().iter().zip(found);
        worst = pairs
            .map(|(expected, found)| (expected.as_f64().unwrap() as f32 - found).abs())
            .fold(worst, f32::max);
    }
    println!("{name}, {} tokens: largest difference {worst:.1e}", prompt["ids"].as_array().unwrap().len());
    assert!(worst < TOLERANCE, "{name}: {worst}");
    let layers = prompt["experts"].as_object().unwrap();
    assert_eq!(layers.len(), heard.routing.len());
    for ((layer, rows), routing) in layers.iter().zip(&heard.routing) {
        for (row, expected) in rows.as_array().unwrap().iter().enumerate() {
            let mut chosen = routing.experts[row * routing.top_k..][..routing.top_k].to_vec();
            chosen.sort_unstable();
            assert_eq!(chosen, ids(expected), "{name}: layer {layer}, position {row}");
        }
    }
}

#[test]
fn v2_lite() {
    let rig = check("v2_lite");
    let config = &rig.runner.model().config;
    assert_eq!((config.architecture, config.q_lora_rank), (Architecture::DeepseekV2, None));
    assert_eq!(config.moe.as_ref().unwrap().shared_width, 48, "two shared experts are one MLP");
}

#[test]
fn kimi_k2() {
    let rig = check("k2");
    let model = rig.runner.model();
    assert_eq!(
        (model.config.architecture, model.config.model_type.as_str()),
        (Architecture::DeepseekV3, "kimi_k2")
    );
    assert_eq!(model.eos, [1, 2]);
}
