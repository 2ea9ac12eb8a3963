//! The engine over the demo model on the CPU: known answers, and one answer however it is computed.

use engine::{
    EngineConfig, EngineHandle, Event, Finish, FirstToken, ModelExecutor, Refused, Reservation, Role,
    SequenceSpec, spawn,
};
use kernels::{CpuBackend, SampledToken, Sampling, cpu::CpuOptions};
use model::{ModelRunner, RunnerOptions};
use serde_json::Value;
use std::{path::PathBuf, time::Duration};
use tokio::task::JoinSet;

const BLOCK_TOKENS: u32 = 16;
const EOS: u32 = 1;

fn demo(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo").join(file)
}

fn read(file: &str) -> String {
    std::fs::read_to_string(demo(file)).expect("the demo model is part of the tree")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Prompts and their exact answers, end-of-sentence included.
fn golden() -> Vec<(Vec<u32>, Vec<u32>)> {
    let pair = |line: &str| {
        let value: Value = serde_json::from_str(line).expect("a line is an object");
        (ids(&value["prompt_ids"]), ids(&value["answer_ids"]))
    };
    read("golden.jsonl").lines().map(pair).collect()
}

/// Prose of up to 700 tokens.
fn references() -> Vec<Vec<u32>> {
    let value: Value = serde_json::from_str(&read("reference.json")).expect("the file is an object");
    value["prompts"].as_array().expect("a list").iter().map(|prompt| ids(&prompt["ids"])).collect()
}

fn start(role: Role, blocks: u32, chunk: u32, prefix_cache: bool) -> EngineHandle {
    let options = RunnerOptions {
        block_tokens: BLOCK_TOKENS,
        kv: model::KvSize::Blocks(blocks),
        max_sequences: 16,
        max_step_tokens: chunk,
        ..RunnerOptions::default()
    };
    let backend = CpuBackend::new(CpuOptions::default()).expect("a thread pool");
    let runner = ModelRunner::load(&demo("checkpoint"), backend, options).expect("the demo model loads");
    let executor = ModelExecutor::new(runner, None).expect("a thread");
    spawn(
        executor,
        EngineConfig { role, max_sequences: 16, max_step_tokens: chunk, prefix_cache, ..Default::default() },
    )
}

fn greedy(prompt: Vec<u32>) -> SequenceSpec {
    SequenceSpec {
        request_id: "test".to_owned(),
        prompt_len: prompt.len(),
        tokens: prompt,
        sampling: Sampling::default(),
        max_tokens: 100,
        stop_ids: vec![EOS],
        priority: 0,
        forced: None,
    }
}

/// Noise, penalties and logprobs, so that every bit of the logits and of the slot's state counts.
fn seeded(prompt: Vec<u32>, seed: u64) -> SequenceSpec {
    let sampling = Sampling {
        temperature: 1.0,
        top_p: 0.95,
        presence_penalty: 0.3,
        frequency_penalty: 0.2,
        repetition_penalty: 1.1,
        seed,
        logprobs: Some(3),
        ..Sampling::default()
    };
    SequenceSpec { sampling, max_tokens: 40, stop_ids: Vec::new(), ..greedy(prompt) }
}

async fn whole(engine: &EngineHandle, spec: SequenceSpec) -> (Vec<SampledToken>, Finish) {
    let mut running = engine.generate(spec).await.expect("taken");
    let mut tokens = Vec::new();
    loop {
        match running.events.recv().await.expect("goes on to its end") {
            Event::Token { token, .. } => tokens.push(token),
            Event::Finished(finish) => return (tokens, finish),
            Event::Failed(cause) => panic!("{cause}"),
            _ => {}
        }
    }
}

async fn answers(engine: EngineHandle, prompt: Vec<u32>, answer: Vec<u32>) {
    let (tokens, finish) = whole(&engine, greedy(prompt)).await;
    let tokens: Vec<u32> = tokens.iter().map(|token| token.id).collect();
    assert_eq!((tokens, finish), (answer, Finish::Stop(EOS)));
}

async fn assert_idle(engine: &EngineHandle) {
    assert_eq!(engine.check_pool().await.expect("the pool is consistent").held, 0);
}

#[tokio::test]
async fn golden_answers_are_exact_alone_and_batched() {
    // A question and its answer take up to 8 blocks, and sixteen of them are asked at once.
    let engine = start(Role::Both, 20, 32, true);
    for (prompt, answer) in golden().into_iter().step_by(46) {
        answers(engine.clone(), prompt, answer).await;
    }
    let mut tasks = JoinSet::new();
    for (prompt, answer) in golden().into_iter().step_by(4) {
        tasks.spawn(answers(engine.clone(), prompt, answer));
    }
    tasks.join_all().await;
    assert_idle(&engine).await;
}

/// Reserves, as a router does while there is no room.
async fn reserve(decode: &EngineHandle, spec: &SequenceSpec) -> Reservation {
    loop {
        match decode.reserve(spec.clone()).await {
            Ok(reservation) => return reservation,
            Err(Refused::Full(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(other) => panic!("{other}"),
        }
    }
}

/// Computes on `prefill`, carries the blocks that `decode` lacks; the first token.
async fn deliver(
    prefill: &EngineHandle,
    decode: &EngineHandle,
    spec: SequenceSpec,
    to: &Reservation,
) -> SampledToken {
    let (source, target) = (prefill.kv_memory(), decode.kv_memory());
    let mut running = prefill.prefill(spec).await.expect("taken");
    loop {
        match running.events.recv().await.expect("goes on to its token") {
            Event::Token { token, .. } => return token,
            Event::Failed(cause) => panic!("{cause}"),
            Event::Computed { blocks, after } => {
                for computed in blocks.into_iter().filter(|computed| computed.index >= to.present) {
                    let payload = source
                        .read(computed.block, computed.rows, after)
                        .await
                        .expect("alive")
                        .expect("read");
                    let block = to.blocks[computed.index as usize];
                    let write = target.write(block, computed.rows, payload, decode.last_submitted());
                    write.await.expect("alive").expect("written");
                    running.release(computed.index);
                }
            }
            _ => {}
        }
    }
}

/// The answer by two engines, and how often it was placed: once, and once more for every preemption.
async fn split(
    prefill: &EngineHandle,
    decode: &EngineHandle,
    spec: SequenceSpec,
) -> (Vec<SampledToken>, Finish, usize) {
    let mut output: Vec<SampledToken> = Vec::new();
    for placements in 1.. {
        let mut continued = spec.clone();
        continued.tokens.extend(output.iter().map(|token| token.id));
        let reservation = reserve(decode, &continued).await;
        let first = deliver(prefill, decode, continued, &reservation).await;
        let mut running = reservation.activate(FirstToken(first.id)).await;
        output.push(first);
        loop {
            match running.events.recv().await.expect("goes on to its end") {
                Event::Token { token, .. } => output.push(token),
                Event::Finished(finish) => return (output, finish, placements),
                Event::Preempted => break,
                other => panic!("unexpected {other:?}"),
            }
        }
    }
    unreachable!()
}

#[tokio::test]
async fn an_answer_is_the_same_bits_alone_batched_split_cached_and_preempted() {
    let alone = start(Role::Both, 128, 512, false);
    // The longest sequence takes 47 blocks.
    let crowded = start(Role::Both, 48, 32, true);
    let (prefill, decode) = (start(Role::Prefill, 60, 48, true), start(Role::Decode, 48, 16, true));
    let short = golden().into_iter().step_by(20).map(|(prompt, _)| prompt);
    let mut asks = Vec::new();
    for (seed, prompt) in references().into_iter().chain(short).enumerate() {
        let spec = seeded(prompt, seed as u64);
        asks.push((spec.clone(), whole(&alone, spec).await));
    }
    let sequences = asks.len();
    let mut tasks = JoinSet::new();
    for (spec, expected) in asks {
        let (crowded, prefill, decode) = (crowded.clone(), prefill.clone(), decode.clone());
        tasks.spawn(async move {
            let (batched, (output, finish, placements)) =
                tokio::join!(whole(&crowded, spec.clone()), split(&prefill, &decode, spec));
            assert_eq!(batched, expected);
            assert_eq!((output, finish), expected);
            placements
        });
    }
    let placements: usize = tasks.join_all().await.into_iter().sum();
    println!("{sequences} sequences were placed {placements} times");
    assert!(placements > sequences, "the pool is small enough that somebody was preempted");
    for engine in [&alone, &crowded, &prefill, &decode] {
        assert_idle(engine).await;
    }
}
