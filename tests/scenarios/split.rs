//! Split equals whole: the same requests give the same tokens and logprobs, bit for bit, on one worker that does both and
//! across a hand-off, alone and in a crowd, in small and large chunks, from a warm cache, and under preemption.

use crate::harness::{Answer, Ask, Cluster, alone, block_on, golden, has_nixl, is_proof};
use futures::{StreamExt, stream};
use std::sync::OnceLock;

const WHOLE: [&str; 6] = ["--prefill", "0", "--decode", "0", "--both", "1"];
/// Room for the longest request and one block more, all of which may be reserved.
const SMALL_POOL: [&str; 4] = ["--kv-blocks", "15", "--worker-set", "max_reserved_share=1.0"];
/// Room for every prompt, so that a second round finds them all.
const ROOMY_POOL: [&str; 2] = ["--kv-blocks", "768"];
const BLOCK: u64 = 64;

#[test]
fn split_small_chunks_in_a_crowd() {
    let _alone = alone();
    compare(&["--chunk", "32"], 64, 1);
}

#[test]
fn split_large_chunks_one_at_a_time_cold_and_warm() {
    let _alone = alone();
    compare(&[&["--chunk", "512"][..], &ROOMY_POOL].concat(), 1, 2);
}

/// The blocks read by decode out of prefill's memory.
#[test]
fn split_over_nixl() {
    if !has_nixl() {
        return println!("left out: this binary is built without NIXL; make test-rdma is with it");
    }
    let _alone = alone();
    let cluster = compare(&["--transport", "nixl", "--chunk", "32"], 64, 1);
    let decode = cluster.workers.iter().find(|worker| worker.role == "decode").unwrap();
    let bytes = block_on(cluster.metric(decode, "baton_handoff_bytes_total", "nixl"));
    println!("{bytes} bytes were handed off through NIXL");
    assert!(bytes > 0.0);
}

#[test]
fn split_under_preemption() {
    let _alone = alone();
    let cluster = compare(&[&["--chunk", "512"][..], &SMALL_POOL].concat(), 64, 1);
    let migrated = block_on(cluster.metric(&cluster.router, "baton_migrations_total", "preempted"));
    println!("{migrated} sequences were preempted and continued elsewhere");
    assert!(migrated > 0.0, "the pool was not small enough to preempt anybody");
}

#[test]
fn split_whole_in_a_crowd_and_under_preemption() {
    let _alone = alone();
    compare(&[&["--chunk", "32"][..], &WHOLE, &SMALL_POOL].concat(), 64, 1);
}

#[test]
fn split_large_chunks_in_a_crowd() {
    let _alone = alone();
    if is_proof("split") {
        compare(&[&["--chunk", "512"][..], &ROOMY_POOL].concat(), 64, 2);
        compare(&["--chunk", "32"], 1, 1);
        compare(&[&["--chunk", "512", "--worker-set", "prefix_cache=false"][..], &WHOLE].concat(), 1, 1);
    } else {
        compare(&["--chunk", "512"], 64, 1);
    }
}

/// Runs every ask `rounds` times, `at_once` at a time, and compares with the whole, undisturbed run.
fn compare(arguments: &[&str], at_once: usize, rounds: usize) -> Cluster {
    let expected = undisturbed();
    let cluster = Cluster::up(arguments);
    block_on(async {
        for round in 0..rounds {
            let found = answers(&cluster, at_once).await;
            for (number, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_eq!(found.said(), expected.said(), "request {number}, round {round}, {arguments:?}");
                let full_blocks = (found.prompt_tokens - 1) / BLOCK * BLOCK;
                assert!(round == 0 || found.cached == full_blocks, "request {number} found {}", found.cached);
            }
            let count = found.len();
            println!("{count} of {count} equal: {arguments:?}, {at_once} at a time, round {round}");
        }
        cluster.assert_idle().await;
    });
    cluster
}

/// Every answer by one worker that does both, one at a time, without a prefix cache.
fn undisturbed() -> &'static [Answer] {
    static EXPECTED: OnceLock<Vec<Answer>> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let cluster = Cluster::up(&[&["--worker-set", "prefix_cache=false"][..], &WHOLE].concat());
        block_on(answers(&cluster, 1))
    })
}

async fn answers(cluster: &Cluster, at_once: usize) -> Vec<Answer> {
    let sent = asks().into_iter().map(|ask| async move { ask.send(cluster).await.expect("an answer") });
    stream::iter(sent).buffered(at_once).collect().await
}

/// Mixed lengths, some with a common beginning; a third greedy, the rest sampled in every way there is.
fn asks() -> Vec<Ask> {
    let count = if is_proof("split") { 200 } else { 36 };
    let lengths = [1, 7, 20, 63, 64, 65, 100, 128, 130, 200, 257, 400, 640];
    (0..count)
        .map(|number| {
            let prompt = golden::prose(lengths[number % lengths.len()], number % 5);
            let ask = Ask::new(&prompt, [8, 40, 240][number % 3]).with("seed", number as i64 - 3);
            match number % 6 {
                0 | 3 => ask,
                1 => ask.with("temperature", 0.8).with("top_p", 0.9),
                2 => ask.with("temperature", 1.3).with("top_k", 40).with("min_p", 0.02),
                4 => {
                    ask.with("temperature", 0.7).with("presence_penalty", 0.6).with("frequency_penalty", 0.4)
                }
                _ => ask.with("temperature", 1.0).with("repetition_penalty", 1.2).with("min_tokens", 4),
            }
        })
        .collect()
}
