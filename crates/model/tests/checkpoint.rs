//! Directories, sound and broken: what is wrong is said before anything is served, with file, tensor, expected and found.

mod support;
#[path = "support/synthetic.rs"]
mod synthetic;

use kernels::cpu::CpuOptions;
use model::{Error, check_directory, weights_fingerprint};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::{fs, path::Path};
use support::{OPTIONS, Rig};
use synthetic::{Synthetic, f32_tensor};

const GATE: &str = "model.layers.1.mlp.experts.2.gate_proj.weight";

fn logits(dir: &Path) -> Vec<Vec<f32>> {
    let mut rig = Rig::new(dir, OPTIONS, CpuOptions::default());
    rig.run(&(2..60).collect::<Vec<u32>>(), &[3, 1], 40, 3);
    rig.heard().logits.into_values().collect()
}

/// The message of the error that checking or loading gives.
fn refusal(dir: &Path) -> String {
    let backend = kernels::CpuBackend::new(CpuOptions::default()).unwrap();
    match model::ModelRunner::load(dir, backend, OPTIONS) {
        Ok(_) => panic!("{} was loaded", dir.display()),
        Err(error) => error.to_string(),
    }
}

fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn refused(change: impl FnOnce(&mut Synthetic), parts: &[&str]) {
    let mut model = Synthetic::fp8();
    change(&mut model);
    let dir = model.write();
    let file = if parts[0].ends_with(".json") { "config.json" } else { "model.safetensors" };
    let message = refusal(dir.path());
    assert_says(&message, &[&dir.path().join(file).display().to_string()]);
    assert_says(&message, parts);
}

fn with_config(key: &str, value: Value, parts: &[&str]) {
    refused(|model| model.config[key] = value, &[&["config.json"], parts].concat());
}

#[test]
fn fp8_equals_its_dequantized_twin_bit_for_bit_in_any_number_of_files() {
    let model = Synthetic::fp8();
    let expected = logits(model.write().path());
    assert_eq!(expected.len(), 60);
    assert!(expected.iter().flatten().all(|z| z.is_finite()));
    assert_eq!(logits(model.dequantized().write().path()), expected);
    assert_eq!(logits(model.write_sharded(3).path()), expected);
}

#[test]
fn other_tensors_are_counted_and_left() {
    let directory = check_directory(Synthetic::fp8().write().path()).unwrap();
    assert_eq!((directory.mtp_tensors, directory.unexpected_tensors), (1, 1));
}

#[test]
fn tensors_that_are_missing_or_misshapen_are_named() {
    refused(|m| drop(m.tensors.remove(GATE)), &[GATE, "expected shape [16, 32]", "no such tensor"]);
    let scales = format!("{GATE}_scale_inv");
    refused(|m| drop(m.tensors.remove(&scales)), &[&scales, "expected shape [1, 2]", "no such tensor"]);
    refused(|m| drop(m.tensors.insert(scales.clone(), f32_tensor(&[1, 1], &[1.0]))), &["found shape [1, 1]"]);
    let norm = "model.norm.weight";
    refused(|m| drop(m.tensors.insert(norm.into(), f32_tensor(&[31], &[1.0; 31]))), &[norm, "[32]", "[31]"]);
    let bias = "model.layers.1.mlp.gate.e_score_correction_bias";
    refused(|m| drop(m.tensors.remove(bias)), &[bias, "expected shape [4]"]);
}

#[test]
fn tensors_of_a_wrong_type_or_with_nan_are_named() {
    let retype = |dtype, width: usize| {
        move |m: &mut Synthetic| {
            let tensor = m.tensors.get_mut("model.norm.weight").unwrap();
            (tensor.dtype, tensor.bytes) = (dtype, vec![0; 32 * width]);
        }
    };
    refused(retype(Dtype::I32, 4), &["model.norm.weight", "expected BF16, F16 or F32, found I32"]);
    refused(retype(Dtype::F8_E4M3, 1), &["model.norm.weight", "found F8_E4M3"]);
    refused(|m| m.tensors.get_mut(GATE).unwrap().bytes[33] = 0x7f, &[GATE, "[1, 1]", "NaN"]);
    let undeclared =
        |m: &mut Synthetic| drop(m.config.as_object_mut().unwrap().remove("quantization_config"));
    refused(undeclared, &["config.json declares no FP8"]);
}

#[test]
fn truncated_and_padded_files_are_found_by_their_length() {
    let dir = Synthetic::fp8().write();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let said = |bytes: &[u8], parts: &[&str]| {
        fs::write(&path, bytes).unwrap();
        let message = check_directory(dir.path()).err().unwrap().to_string();
        assert_says(&message, &[&path.display().to_string()]);
        assert_says(&message, parts);
    };
    let expected = format!("expected {} bytes, found", bytes.len());
    said(&bytes[..bytes.len() - 100], &["truncated", &expected, "incomplete", "fetch"]);
    said(&bytes[..500], &["truncated within its header"]);
    said(&bytes[..5], &["too short"]);
    said(&[&bytes[..], &[0; 9]].concat(), &[&expected, "after the last tensor"]);
    said(b"<!DOCTYPE html><html></html>", &["not a safetensors file"]);
}

#[test]
fn an_index_that_lies_is_found() {
    let dir = Synthetic::fp8().write_sharded(2);
    let index = dir.path().join("model.safetensors.index.json");
    let mut listing: Value = serde_json::from_str(&fs::read_to_string(&index).unwrap()).unwrap();
    listing["weight_map"][GATE] = listing["weight_map"]["model.norm.weight"].clone();
    listing["weight_map"]["model.embed_tokens.weight"] = listing["weight_map"]["model.norm.weight"].clone();
    fs::write(&index, listing.to_string()).unwrap();
    assert_says(
        &check_directory(dir.path()).err().unwrap().to_string(),
        &["as the index says", "found it in"],
    );
    listing["weight_map"][GATE] = json!("absent.safetensors");
    fs::write(&index, listing.to_string()).unwrap();
    assert_says(
        &check_directory(dir.path()).err().unwrap().to_string(),
        &["absent.safetensors", "No such file"],
    );
}

#[test]
fn models_of_another_kind_are_refused_by_name() {
    with_config(
        "architectures",
        json!(["LlamaForCausalLM"]),
        &["unsupported", "LlamaForCausalLM", "DeepseekV3ForCausalLM"],
    );
    with_config("architectures", json!(["DeepseekV32ForCausalLM"]), &["unsupported", "sparse attention"]);
    with_config("scoring_func", json!("tanh"), &["scoring_func", "tanh", "sigmoid"]);
    with_config("topk_method", json!("random"), &["topk_method", "random", "noaux_tc"]);
    with_config("hidden_act", json!("gelu"), &["hidden_act", "gelu", "silu"]);
    with_config("rope_scaling", json!({"type": "linear", "factor": 2}), &["rope", "linear", "yarn"]);
    with_config("quantization_config", json!({"quant_method": "awq"}), &["quant_method", "awq", "fp8"]);
    with_config("num_experts_per_tok", json!(3), &["3 experts per token"]);
    with_config("vocab_size", json!("many"), &["invalid type"]);
    refused(
        |m| drop(m.config.as_object_mut().unwrap().remove("hidden_size")),
        &["config.json", "hidden_size"],
    );
}

#[test]
fn a_tiktoken_vocabulary_is_told_how_to_convert() {
    let dir = Synthetic::fp8().write();
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert_says(&refusal(dir.path()), &["tokenizer.json", "absent", "download"]);
    fs::write(dir.path().join("tiktoken.model"), "").unwrap();
    assert_says(&refusal(dir.path()), &["tiktoken.model", "convert_tiktoken_to_fast"]);
}

#[test]
fn the_new_spelling_of_rope_means_the_same() {
    let old = check_directory(Synthetic::fp8().write().path()).unwrap().config;
    let mut model = Synthetic::fp8();
    let config = model.config.as_object_mut().unwrap();
    let mut rope = config.remove("rope_scaling").unwrap();
    rope["rope_theta"] = config.remove("rope_theta").unwrap();
    rope["rope_type"] = rope.as_object_mut().unwrap().remove("type").unwrap();
    config.insert("rope_parameters".to_string(), rope);
    assert_eq!(check_directory(model.write().path()).unwrap().config, old);
    let mut both = Synthetic::fp8();
    both.config["rope_scaling"]["rope_type"] = json!("yarn");
    assert_eq!(check_directory(both.write().path()).unwrap().config, old);
    let mut plain = Synthetic::fp8();
    plain.config["rope_scaling"] = Value::Null;
    assert_eq!(check_directory(plain.write().path()).unwrap().config.rope.yarn, None);
}

#[test]
fn eos_may_be_one_or_many_and_generation_config_overrides() {
    let dir = Synthetic::fp8().write();
    let eos = |dir: &Path| Rig::new(dir, OPTIONS, CpuOptions::default()).runner.model().eos.clone();
    assert_eq!(eos(dir.path()), [1]);
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [1, 5], "temperature": 0.6}"#)
        .unwrap();
    assert_eq!(eos(dir.path()), [1, 5]);
    assert_eq!(check_directory(dir.path()).unwrap().generation.temperature, Some(0.6));
}

#[test]
fn a_tied_head_is_the_embedding() {
    let mut model = Synthetic::fp8();
    let embedding = model.tensors["model.embed_tokens.weight"].clone();
    model.tensors.insert("lm_head.weight".to_string(), embedding);
    let expected = logits(model.write().path());
    model.tensors.remove("lm_head.weight");
    model.config["tie_word_embeddings"] = json!(true);
    assert_eq!(logits(model.write().path()), expected);
}

#[test]
fn the_fingerprint_is_of_the_weights_not_of_the_files() {
    let mut model = Synthetic::fp8();
    let expected = weights_fingerprint(model.write().path()).unwrap();
    assert_eq!(weights_fingerprint(model.write_sharded(4).path()).unwrap(), expected);
    model.config["transformers_version"] = json!("9.9");
    assert_eq!(weights_fingerprint(model.write().path()).unwrap(), expected);
    let mut other = model.clone();
    other.tensors.get_mut(GATE).unwrap().bytes[0] ^= 1;
    assert_ne!(weights_fingerprint(other.write().path()).unwrap(), expected);
    model.config["routed_scaling_factor"] = json!(2.0);
    assert_ne!(weights_fingerprint(model.write().path()).unwrap(), expected);
}

#[test]
fn options_that_cannot_be_are_refused() {
    let dir = Synthetic::fp8().write();
    for (options, option) in [
        (model::RunnerOptions { max_context: Some(257), ..OPTIONS }, "max_context"),
        (model::RunnerOptions { kv: model::KvSize::Blocks(0), ..OPTIONS }, "blocks"),
        (model::RunnerOptions { tokenizer_size: Some(71), ..OPTIONS }, "tokenizer_size"),
    ] {
        let backend = kernels::CpuBackend::new(CpuOptions::default()).unwrap();
        let refused = model::ModelRunner::load(dir.path(), backend, options);
        assert!(matches!(refused.err(), Some(Error::Option { option: named, .. }) if named == option));
    }
}
