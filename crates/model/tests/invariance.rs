//! The same sequence gives the same bits, whoever shares the batch, however the prompt is cut, wherever its blocks lie,
//! whatever the machine's vectors and threads.

mod support;

use kernels::{
    Input, Sampling, SlotInit, StepInput,
    cpu::{CpuOptions, Level},
};
use model::RunnerOptions;
use std::sync::Arc;
use support::{OPTIONS, Rig, demo, next, read};

const LENGTH: usize = 300;
const TABLE: [u32; 8] = [40, 3, 17, 60, 2, 33, 9, 25];

fn prompt(seed: u32) -> Vec<u32> {
    (0..LENGTH as u32).map(|i| 5 + (i * 37 + seed * 101) % 4000).collect()
}

fn rig(cpu: CpuOptions) -> Rig {
    Rig::new(&demo().join("checkpoint"), OPTIONS, cpu)
}

type Bits = Vec<Vec<u32>>;

fn bits(rig: &Rig, slot: u32) -> Bits {
    let heard = rig.heard();
    let own = heard.logits.iter().filter(|((of, _), _)| *of == slot);
    own.map(|(_, logits)| logits.iter().map(|z| z.to_bits()).collect()).collect()
}

/// Prompt logits and those of four sampled tokens.
fn alone(cpu: CpuOptions, table: &[u32], chunk: usize) -> Bits {
    of_length(LENGTH, cpu, table, chunk)
}

fn of_length(length: usize, cpu: CpuOptions, table: &[u32], chunk: usize) -> Bits {
    let mut rig = rig(cpu);
    rig.run(&prompt(0)[..length], table, chunk, 4);
    bits(&rig, 0)
}

fn assert_same(found: &Bits, expected: &Bits, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let first = found.iter().zip(expected).position(|(a, b)| a != b);
    assert_eq!(first, None, "{what}: logits differ first at this position");
}

#[test]
fn chunks_blocks_and_threads_change_no_bit() {
    let expected = alone(CpuOptions::default(), &TABLE, 512);
    assert_eq!(expected.len(), LENGTH + 3);
    for chunk in [1, 7, 32, 64] {
        assert_same(&alone(CpuOptions::default(), &TABLE, chunk), &expected, &format!("chunk {chunk}"));
    }
    let other_blocks = alone(CpuOptions::default(), &[0, 1, 2, 3, 4, 5], 100);
    assert_same(&other_blocks, &expected, "other blocks");
    let threads = CpuOptions { threads: 5, ..CpuOptions::default() };
    assert_same(&alone(threads, &TABLE, 90), &expected, "five threads");
}

/// Without FMA instructions a step takes seconds, so a short prompt.
#[test]
fn the_vectors_of_the_machine_change_no_bit() {
    let of_level = |level| {
        let options = CpuOptions { level: Some(level), threads: 1, ..CpuOptions::default() };
        of_length(70, options, &TABLE, 40)
    };
    let expected = of_level(Level::Portable);
    for level in Level::available() {
        assert_same(&of_level(level), &expected, &format!("{level:?}"));
    }
}

#[test]
fn the_size_of_a_block_changes_no_bit() {
    let expected = alone(CpuOptions::default(), &TABLE, 512);
    let options = RunnerOptions { block_tokens: 16, kv: model::KvSize::Blocks(64), ..OPTIONS };
    let mut rig = Rig::new(&demo().join("checkpoint"), options, CpuOptions::default());
    rig.run(&prompt(0), &(20..40).collect::<Vec<u32>>(), 512, 4);
    assert_same(&bits(&rig, 0), &expected, "blocks of 16");
}

/// Three prompts that start at different steps and advance by different chunks, then decode together.
#[test]
fn the_batch_changes_no_bit() {
    let expected = alone(CpuOptions::default(), &TABLE, 512);
    let mut rig = rig(CpuOptions::default());
    let sequences = [(0u32, 50usize, 0usize), (1, 120, 0), (2, 33, 2)];
    let tables: [Vec<u32>; 3] = [TABLE.to_vec(), vec![50, 51, 52, 53, 54, 55], vec![0, 1, 4, 5, 6, 7]];
    let mut done = [0usize; 3];
    for round in 0.. {
        let mut step = StepInput::default();
        for (slot, chunk, first_round) in sequences {
            let (tokens, table, done) = (prompt(slot), &tables[slot as usize], &mut done[slot as usize]);
            if round < first_round || *done >= LENGTH + 3 {
                continue;
            }
            if *done == 0 {
                step.init.push(init(slot, &tokens));
            }
            if *done < LENGTH {
                let end = (*done + chunk).min(LENGTH);
                let mut entry = read(slot, &tokens[*done..end], *done, table);
                entry.sample = end == LENGTH;
                step.entries.push(entry);
                *done = end;
            } else {
                step.entries.push(next(slot, *done, table));
                *done += 1;
            }
        }
        if step.entries.is_empty() {
            break;
        }
        step.entries.reverse();
        rig.step(step);
    }
    assert_same(&bits(&rig, 0), &expected, "in a batch of three");
}

fn write(rig: &mut Rig, block: u32, rows: u32, payload: kv::Payload) -> Result<(), kv::KvError> {
    let (reply, mut written) = kv::transfer();
    rig.runner.kv_write(block, rows, payload, reply).unwrap();
    written.try_recv().unwrap()
}

/// What one worker computed, another goes on from: blocks travel as bytes, and damaged ones are refused.
#[test]
fn blocks_read_here_and_written_there_change_no_bit() {
    let mut expected_rig = rig(CpuOptions::default());
    let expected = expected_rig.run(&prompt(0), &TABLE, 512, 6);
    let (mut from, mut to) = (rig(CpuOptions::default()), rig(CpuOptions::default()));
    let first = from.run(&prompt(0), &TABLE, 70, 1);
    let other_table = [5, 6, 7, 8, 9, 10];
    for (index, block) in other_table.iter().take(LENGTH.div_ceil(64)).enumerate() {
        let rows = 64.min(LENGTH - index * 64) as u32;
        let payload = {
            let (reply, mut read) = kv::transfer();
            from.runner.kv_read(TABLE[index], rows, reply).unwrap();
            read.try_recv().unwrap().unwrap()
        };
        assert_eq!(payload.bytes.len(), from.runner.layout().payload_bytes(rows));
        let mut damaged = payload.clone();
        let mut bytes = payload.bytes.together().to_vec();
        bytes[99] ^= 1;
        damaged.bytes = bytes.into();
        assert!(matches!(write(&mut to, *block, rows, damaged), Err(kv::KvError::Damaged { .. })));
        write(&mut to, *block, rows, payload).unwrap();
    }
    let tokens = [prompt(0), first.clone()].concat();
    let mut entry = read(0, &first, LENGTH, &other_table);
    entry.sample = true;
    let init = SlotInit { prompt_len: LENGTH as u32, ..init(0, &tokens) };
    let mut found = first;
    found.push(to.step(StepInput { init: vec![init], entries: vec![entry] })[0].sampled.as_ref().unwrap().id);
    while found.len() < expected.len() {
        let entry = next(0, LENGTH + found.len() - 1, &other_table);
        found.push(to.step(StepInput { init: vec![], entries: vec![entry] })[0].sampled.as_ref().unwrap().id);
    }
    assert_eq!(found, expected);
    let last = |rig: &Rig| rig.heard().logits.remove(&(0, (LENGTH + 4) as u32)).unwrap();
    assert_eq!(last(&to), last(&expected_rig));
}

/// A sequence that was preempted is read again, output and all, and goes on with the same noise and penalties.
#[test]
fn a_continuation_draws_what_would_have_been_drawn() {
    let sampling = Sampling {
        temperature: 1.5,
        top_k: 200,
        top_p: 0.95,
        min_p: 0.001,
        presence_penalty: 0.5,
        frequency_penalty: 0.3,
        repetition_penalty: 1.2,
        logit_bias: vec![(7, 2.0)],
        seed: 11,
        logprobs: Some(3),
        ..Sampling::default()
    };
    let mut whole = rig(CpuOptions::default());
    let expected = draw(&mut whole, &sampling, &[], 12);
    let ids: Vec<u32> = expected.iter().map(|token| token.id).collect();
    assert!(ids.iter().collect::<std::collections::HashSet<_>>().len() > 6, "sampling must not be trivial");
    for kept in [1, 5, 11] {
        let mut again = rig(CpuOptions::default());
        assert_eq!(draw(&mut again, &sampling, &ids[..kept], 12 - kept), expected[kept..]);
    }
    let other = Sampling { seed: 12, ..sampling };
    assert_ne!(draw(&mut whole, &other, &[], 12), expected);
}

/// Samples `count` tokens after a prompt and earlier output.
fn draw(rig: &mut Rig, sampling: &Sampling, output: &[u32], count: usize) -> Vec<kernels::SampledToken> {
    let tokens = [&prompt(0)[..90], output].concat();
    let init = SlotInit {
        slot: 3,
        tokens: tokens.as_slice().into(),
        prompt_len: 90,
        sampling: Arc::new(sampling.clone()),
    };
    let mut entry = read(3, &tokens, 0, &TABLE);
    (entry.sample, entry.prompt_logprobs) = (true, None);
    let mut step = StepInput { init: vec![init], entries: vec![entry] };
    let mut drawn = Vec::new();
    while drawn.len() < count {
        drawn.push(rig.step(std::mem::take(&mut step)).remove(0).sampled.unwrap());
        step.entries = vec![next(3, tokens.len() + drawn.len() - 1, &TABLE)];
    }
    drawn
}

#[test]
fn impossible_steps_are_refused_and_leave_the_runner_usable() {
    let mut rig = rig(CpuOptions::default());
    let expected = rig.run(&prompt(0), &TABLE, 512, 2);
    let good = read(0, &prompt(0), 0, &TABLE);
    let wrong = [
        kernels::Entry { slot: 99, ..good.clone() },
        kernels::Entry { block_table: vec![1, 2], ..good.clone() },
        kernels::Entry { block_table: vec![1, 2, 3, 4, 64], ..good.clone() },
        kernels::Entry { start: 2000, block_table: vec![0; 64], ..good.clone() },
        kernels::Entry { input: Input::Tokens(vec![4096]), prompt_logprobs: None, ..good.clone() },
        kernels::Entry { slot: 7, input: Input::Sampled, prompt_logprobs: None, ..good },
    ];
    for entry in wrong {
        let step = StepInput { init: vec![], entries: vec![entry.clone()] };
        assert!(matches!(rig.runner.launch(&step), Err(kernels::Error::Step(_))), "{entry:?}");
    }
    assert_eq!(rig.run(&prompt(0), &TABLE, 512, 2), expected);
}

fn init(slot: u32, tokens: &[u32]) -> SlotInit {
    let sampling = Arc::new(Sampling::default());
    SlotInit { slot, tokens: tokens.into(), prompt_len: tokens.len() as u32, sampling }
}
