//! The demo model against float32 vectors made by Hugging Face transformers (deploy/demo/README.md says how).

mod support;

use kernels::cpu::{CpuOptions, MlaForm};
use serde_json::Value;
use support::{OPTIONS, Rig, demo, log_sum_exp};

/// Of a logit or a log-sum-exp; measured on the way: a few 1e-5.
const TOLERANCE: f64 = 1e-3;

fn prompts() -> Vec<Value> {
    let text = std::fs::read_to_string(demo().join("reference.json")).unwrap();
    let mut reference: Value = serde_json::from_str(&text).unwrap();
    std::mem::take(reference["prompts"].as_array_mut().unwrap())
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Largest difference of the listed logits and log-sum-exps.
fn compare(rig: &Rig, prompt: &Value) -> f64 {
    let heard = rig.heard();
    let mut worst = 0.0f64;
    for (position, expected) in prompt["positions"].as_array().unwrap().iter().enumerate() {
        let logits = &heard.logits[&(0, position as u32)];
        worst = worst.max((log_sum_exp(logits) - expected["lse"].as_f64().unwrap()).abs());
        for pair in expected["top"].as_array().unwrap() {
            let found = f64::from(logits[pair[0].as_u64().unwrap() as usize]);
            worst = worst.max((found - pair[1].as_f64().unwrap()).abs());
        }
    }
    let layers = prompt["experts"].as_object().into_iter().flatten();
    for ((layer, rows), routing) in layers.zip(&heard.routing) {
        for (row, expected) in rows.as_array().unwrap().iter().enumerate() {
            let mut chosen = routing.experts[row * routing.top_k..][..routing.top_k].to_vec();
            chosen.sort_unstable();
            assert_eq!(chosen, ids(expected), "{}: layer {layer}, position {row}", prompt["name"]);
        }
    }
    worst
}

fn check(rig: &mut Rig, prompt: &Value) -> f64 {
    let table: Vec<u32> = (0..12).rev().collect();
    rig.run(&ids(&prompt["ids"]), &table, 1024, 0);
    let worst = compare(rig, prompt);
    println!("{}: largest difference {worst:.1e}", prompt["name"]);
    assert!(worst < TOLERANCE, "{}: {worst}", prompt["name"]);
    worst
}

#[test]
fn logits_and_experts_are_those_of_the_reference() {
    let mut rig = Rig::new(&demo().join("checkpoint"), OPTIONS, CpuOptions::default());
    let prompts = prompts();
    assert_eq!(prompts.len(), 8);
    assert!(prompts.iter().any(|prompt| prompt["experts"].is_object()));
    prompts.iter().for_each(|prompt| {
        check(&mut rig, prompt);
    });
}

/// The direct form of attention is slow, so the short prompts only.
#[test]
fn the_direct_form_agrees_too() {
    let options = CpuOptions { form: MlaForm::Direct, ..CpuOptions::default() };
    let mut rig = Rig::new(&demo().join("checkpoint"), OPTIONS, options);
    let prompts = prompts();
    let short: Vec<_> = prompts.iter().filter(|p| ids(&p["ids"]).len() < 150).collect();
    assert!(short.len() >= 5);
    short.into_iter().for_each(|prompt| {
        check(&mut rig, prompt);
    });
}

#[test]
fn greedy_continuations_are_equal_where_margins_demand_it() {
    let mut rig = Rig::new(&demo().join("checkpoint"), OPTIONS, CpuOptions::default());
    let table: Vec<u32> = (0..16).collect();
    for prompt in prompts() {
        let (expected, margins) = (ids(&prompt["greedy"]), prompt["margins"].as_array().unwrap().clone());
        let found = rig.run(&ids(&prompt["ids"]), &table, 64, expected.len());
        let demanded = margins.iter().take_while(|margin| margin.as_f64().unwrap() > 0.01).count();
        assert!(demanded > 0);
        assert_eq!(found[..demanded], expected[..demanded], "{}", prompt["name"]);
        rig.heard();
    }
}

/// Answers that the model was trained to give, sixteen sequences at once: the margin is never below 4.
#[test]
fn golden_answers_are_exact_in_batches() {
    let mut rig = Rig::new(&demo().join("checkpoint"), OPTIONS, CpuOptions::default());
    let text = std::fs::read_to_string(demo().join("golden.jsonl")).unwrap();
    let golden: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(golden.len(), 276);
    for batch in golden.chunks(16) {
        let prompts: Vec<Vec<u32>> = batch.iter().map(|item| ids(&item["prompt_ids"])).collect();
        let answers: Vec<Vec<u32>> = batch.iter().map(|item| ids(&item["answer_ids"])).collect();
        let longest = answers.iter().map(Vec::len).max().unwrap();
        assert_eq!(rig.run_batch(&prompts, &answers, longest), answers);
        rig.heard();
    }
}
