//! The sampler: the same tokens, ranks and lists as on the CPU, logprobs up to rounding, state that follows the tokens.

use super::support;
use kernels::{
    Logprobs, MAX_BIASES, MAX_LOGPROBS, MAX_SUPPRESSED, SampledToken, Sampling, SlotInit,
    cpu::{self, History, Row},
    cuda::{
        device::{Device, Memory},
        sample::{self, RESULT_BYTES, SampleResult, SamplerState},
        step::{Extent, SAMPLED, StepAddresses},
    },
};
use std::sync::Arc;

/// Samples that launches cover beyond those of the step.
const PADDING: u32 = 2;

/// (vocabulary, ids of the tokenizer, spread of the logits, grid of the logits): rows that cannot be read by fours, one that
/// can, ties, and a real one.
const VOCABULARIES: [(u32, u32, f32, f32); 5] = [
    (1003, 1000, 12.0, 1e-6),
    (9, 7, 3.0, 0.5),
    (5000, 4997, 6.0, 1e-6),
    (8192, 8192, 4.0, 0.5),
    (129_280, 128_815, 15.0, 1e-6),
];

/// What the device is to sample from, and what it must find.
struct Case {
    slot: u32,
    start: u32,
    rows: u32,
    init: SlotInit,
    history: History,
}

impl Case {
    fn new(slot: u32, sampling: Sampling, vocab: u32) -> Case {
        let rows = 1 + slot % 3;
        let tokens: Arc<[u32]> = (0..20).map(|i| (i * i * 7 + slot * 13) % vocab.min(40)).collect();
        let history = if sampling.has_penalties() { history(&tokens, 9) } else { History::new() };
        let init = SlotInit { slot, tokens, prompt_len: 9, sampling: Arc::new(sampling) };
        Case { slot, start: 20 - rows + slot % 2, rows, init, history }
    }

    fn expected(&self, logits: &[f32], tokenizer_size: u32) -> Option<SampledToken> {
        cpu::sample(&Row {
            logits,
            tokenizer_size: tokenizer_size as usize,
            sampling: &self.init.sampling,
            history: &self.history,
            position: self.start + self.rows,
            prompt_len: self.init.prompt_len,
        })
    }

    /// The step after the one that gave `token`.
    fn advance(&mut self, token: u32) {
        self.start += self.rows;
        self.rows = 1;
        if self.init.sampling.has_penalties() {
            self.history.entry(token).or_default().output += 1;
        }
    }
}

fn history(tokens: &[u32], prompt_len: usize) -> History {
    let mut history = History::new();
    for (index, token) in tokens.iter().enumerate() {
        let count = history.entry(*token).or_default();
        match index < prompt_len {
            true => count.in_prompt = true,
            false => count.output += 1,
        }
    }
    history
}

/// Every stage alone, and many together.
fn samplings(vocab: u32) -> Vec<Sampling> {
    let greedy = Sampling::default();
    let warm = Sampling { temperature: 0.8, seed: 0x1234_5678_9abc_def0, ..greedy.clone() };
    let penalized = Sampling {
        presence_penalty: 0.7,
        frequency_penalty: -0.3,
        repetition_penalty: 1.3,
        ..greedy.clone()
    };
    let biased = Sampling { logit_bias: bias(vocab, 5), ..greedy.clone() };
    let held_back =
        Sampling { min_tokens: 100, suppress: (0..vocab.min(60)).step_by(2).collect(), ..greedy.clone() };
    let mut all = vec![
        greedy.clone(),
        Sampling { logprobs: Some(0), ..greedy.clone() },
        Sampling { logprobs: Some(MAX_LOGPROBS), ..greedy },
        penalized.clone(),
        biased.clone(),
        held_back.clone(),
        Sampling { min_tokens: 3, ..held_back },
        warm.clone(),
        Sampling { temperature: 30.0, choice: 3, logprobs: Some(5), ..warm.clone() },
        Sampling { temperature: 2e-5, ..warm.clone() },
        Sampling { top_k: 1, ..warm.clone() },
        Sampling { top_k: vocab - 1, temperature: 5.0, ..warm.clone() },
        Sampling { top_p: 0.0, ..warm.clone() },
        Sampling { min_p: 1.5, ..warm.clone() },
        Sampling { repetition_penalty: 2.0, temperature: 1.0, ..warm.clone() },
    ];
    for (index, temperature) in [0.3, 0.7, 1.0, 1.6, 4.0].into_iter().enumerate() {
        let base = Sampling { temperature, seed: 77 + index as u64, ..warm.clone() };
        all.extend([40, 3, 700].map(|top_k| Sampling { top_k, ..base.clone() }));
        all.extend([0.5, 0.9, 0.999].map(|top_p| Sampling { top_p, ..base.clone() }));
        all.extend([0.02, 0.3].map(|min_p| Sampling { min_p, ..base.clone() }));
        all.push(Sampling { top_k: 50, top_p: 0.8, min_p: 0.01, ..base.clone() });
        all.push(Sampling {
            temperature,
            seed: index as u64,
            top_k: 100,
            top_p: 0.95,
            logit_bias: bias(vocab, 3),
            min_tokens: 50,
            suppress: vec![1, 2, vocab - 1],
            logprobs: Some(20),
            ..penalized.clone()
        });
    }
    all.push(Sampling {
        logit_bias: bias(vocab, (vocab as usize).div_ceil(MAX_BIASES)),
        min_tokens: 100,
        suppress: (0..(vocab / 2).min(MAX_SUPPRESSED as u32)).collect(),
        ..biased
    });
    all
}

fn bias(vocab: u32, step: usize) -> Vec<(u32, f32)> {
    let ids = (0..vocab).step_by(step).take(MAX_BIASES);
    ids.map(|id| (id, if id % 3 == 0 { 2.5 } else { -1.25 })).collect()
}

/// In steps of `grid`, so that there are ties.
fn logits(rows: usize, vocab: u32, spread: f32, grid: f32, seed: u64) -> Vec<f32> {
    let values = support::random(rows * vocab as usize, seed);
    values.iter().map(|x| (x * spread / grid).round() * grid).collect()
}

struct Resident {
    addresses: StepAddresses,
    extent: Extent,
    tokens: Memory,
    _memory: [Memory; 6],
}

/// A step in which every case samples, and beside each an entry that does not.
fn resident(device: &Device, cases: &[Case], slots: u32) -> Resident {
    let entries: Vec<(u32, u32, u32)> =
        cases.iter().flat_map(|case| [(slots - 1, 5, 2), (case.slot, case.start, case.rows)]).collect();
    let sample_entry: Vec<u32> = (0..cases.len() as u32).map(|sample| 2 * sample + 1).collect();
    let entry_of_row: Vec<u32> = entries
        .iter()
        .enumerate()
        .flat_map(|(entry, (.., rows))| (0..*rows).map(move |_| entry as u32))
        .collect();
    let rows = entry_of_row.len() as u32;
    let counts = [rows, entries.len() as u32, cases.len() as u32, 0];
    let column = |of: fn(&(u32, u32, u32)) -> u32| {
        support::upload_u32(device, &entries.iter().map(of).collect::<Vec<_>>())
    };
    let memory = [
        support::upload_u32(device, &counts),
        support::upload_u32(device, &entry_of_row),
        column(|(slot, ..)| *slot),
        column(|(_, start, _)| *start),
        column(|(.., rows)| *rows),
        support::upload_u32(device, &sample_entry),
    ];
    let tokens: Vec<u32> = (0..rows + PADDING).map(|row| if row % 2 == 0 { SAMPLED } else { row }).collect();
    let tokens = support::upload_u32(device, &tokens);
    let at = |index: usize| memory[index].address();
    let addresses = StepAddresses {
        counts: at(0),
        tokens: tokens.address(),
        positions: 0,
        entry_of_row: at(1),
        first_row: 0,
        row_count: at(4),
        start: at(3),
        context: 0,
        slot: at(2),
        block_table: 0,
        max_blocks: 0,
        sample_entry: at(5),
        sample_row: 0,
        angles: 0,
    };
    let extent = Extent {
        rows: rows + PADDING,
        entries: entries.len() as u32,
        samples: cases.len() as u32 + PADDING,
        decode: false,
    };
    Resident { addresses, extent, tokens, _memory: memory }
}

/// Samples every case from its row of `logits`; nothing beyond the cases may be written.
fn run(
    device: &Device,
    state: &SamplerState,
    step: &Resident,
    logits: &[f32],
    (vocab, tokenizer_size): (u32, u32),
    cases: usize,
) -> Vec<SampleResult> {
    let samples = step.extent.samples;
    let logits = support::upload_f32(device, logits);
    let scratch = support::poisoned(device, sample::sample_scratch_bytes(samples, vocab));
    let results = support::poisoned(device, samples as usize * RESULT_BYTES);
    let (at, extent) = (&step.addresses, &step.extent);
    let (from, to) = (logits.address(), results.address());
    sample::sample(device, at, extent, state, from, tokenizer_size, scratch.address(), to).expect("launched");
    let bytes = support::download(device, &results);
    let (found, beyond) = bytes.split_at(cases * RESULT_BYTES);
    assert!(beyond.iter().all(|byte| *byte == 0xff), "what is beyond the samples is not touched");
    found.chunks_exact(RESULT_BYTES).map(SampleResult::read).collect()
}

fn assert_same_logprobs(found: &Option<Logprobs>, expected: &Option<Logprobs>, what: &str) {
    let (Some(found), Some(expected)) = (found, expected) else {
        assert_eq!(found, expected, "{what}");
        return;
    };
    let flat = |of: &Logprobs| [&[of.token], of.top.as_slice()].concat();
    let (found, expected) = (flat(found), flat(expected));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!((found.token, found.rank), (expected.token, expected.rank), "{what}");
        let error = (found.logprob - expected.logprob).abs();
        assert!(error <= 1e-6 * expected.logprob.abs().max(1.0), "{what}: {found:?}, {expected:?}");
    }
}

#[test]
fn tokens_and_logprobs_are_those_of_the_cpu() {
    let Some(device) = support::device() else { return };
    for (index, (vocab, tokenizer_size, spread, grid)) in VOCABULARIES.into_iter().enumerate() {
        let samplings = samplings(vocab).into_iter().enumerate();
        let mut cases: Vec<Case> =
            samplings.map(|(slot, sampling)| Case::new(slot as u32, sampling, vocab)).collect();
        let slots = cases.len() as u32 + 1;
        let mut state = SamplerState::new(&device, slots, vocab).expect("memory");
        cases.iter().for_each(|case| state.init_slot(&device, &case.init).expect("within the limits"));
        for turn in 0..4 {
            let seed = 1000 * index as u64 + turn;
            let z = logits(cases.len(), vocab, spread, grid, seed);
            let step = resident(&device, &cases, slots);
            let found = run(&device, &state, &step, &z, (vocab, tokenizer_size), cases.len());
            for ((case, found), z) in cases.iter_mut().zip(found).zip(z.chunks_exact(vocab as usize)) {
                let what = format!("vocabulary {vocab}, turn {turn}, {:?}", case.init.sampling);
                let expected = case.expected(z, tokenizer_size).expect("finite");
                assert!(found.finite, "{what}");
                assert_eq!(found.id, expected.id, "{what}");
                assert_same_logprobs(&found.logprobs, &expected.logprobs, &what);
                case.advance(expected.id);
            }
        }
    }
}

#[test]
fn sampled_tokens_take_the_places_that_wait_for_them() {
    let Some(device) = support::device() else { return };
    let vocab = 1003;
    let cases: Vec<Case> = (0..5).map(|slot| Case::new(slot, Sampling::default(), vocab)).collect();
    let mut state = SamplerState::new(&device, 6, vocab).expect("memory");
    cases.iter().for_each(|case| state.init_slot(&device, &case.init).expect("within the limits"));
    let step = resident(&device, &cases, 6);
    let z = logits(cases.len(), vocab, 5.0, 1e-6, 3);
    let found = run(&device, &state, &step, &z, (vocab, vocab), cases.len());
    sample::resolve(&device, &step.addresses, &step.extent, &state).expect("launched");
    let tokens = support::download_u32(&device, &step.tokens);
    let mut row = 0;
    for (case, found) in cases.iter().zip(&found) {
        // Slot 5 has sampled nothing: its last token is 0, as it was cleared.
        for last in std::iter::repeat_n(0, 2).chain(std::iter::repeat_n(found.id, case.rows as usize)) {
            assert_eq!(tokens[row], if row % 2 == 0 { last } else { row as u32 }, "row {row}");
            row += 1;
        }
    }
    let beyond = (row as u32..).map(|row| if row % 2 == 0 { SAMPLED } else { row });
    assert!(tokens[row..].iter().copied().eq(beyond.take(PADDING as usize)), "{:?}", &tokens[row..]);
}

#[test]
fn logits_that_are_not_finite_are_reported() {
    let Some(device) = support::device() else { return };
    let vocab = 64;
    let warm = Sampling { temperature: 1.0, logprobs: Some(3), ..Sampling::default() };
    let cases: Vec<Case> = (0..4).map(|slot| Case::new(slot, warm.clone(), vocab)).collect();
    let mut state = SamplerState::new(&device, 5, vocab).expect("memory");
    cases.iter().for_each(|case| state.init_slot(&device, &case.init).expect("within the limits"));
    let mut z = vec![1.0; 4 * vocab as usize];
    z[..64].fill(f32::NAN);
    z[64 + 5] = f32::INFINITY;
    z[128..192].fill(f32::NEG_INFINITY);
    let step = resident(&device, &cases, 5);
    let found = run(&device, &state, &step, &z, (vocab, vocab), cases.len());
    let sampled: Vec<bool> = found.into_iter().map(|found| found.sampled().is_some()).collect();
    assert_eq!(sampled, [false, false, false, true]);
}

#[test]
fn logprobs_of_given_tokens_are_those_of_the_cpu() {
    let Some(device) = support::device() else { return };
    for (vocab, tokenizer_size, spread, grid) in VOCABULARIES {
        let rows = 7;
        let z = logits(rows, vocab, spread, grid, 9);
        let targets: Vec<u32> = (0..rows as u32).map(|row| (row * 1237) % vocab).collect();
        let tops: Vec<u32> = (0..rows as u32).map(|row| (row * 5) % (MAX_LOGPROBS + 1)).collect();
        let results = support::poisoned(&device, rows * RESULT_BYTES);
        let (from, wanted, top) = (
            support::upload_f32(&device, &z),
            support::upload_u32(&device, &targets),
            support::upload_u32(&device, &tops),
        );
        let (from, wanted, top) = (from.address(), wanted.address(), top.address());
        let to = results.address();
        sample::logprobs(&device, rows as u32, from, vocab, tokenizer_size, wanted, top, to)
            .expect("launched");
        let bytes = support::download(&device, &results);
        for (row, z) in z.chunks_exact(vocab as usize).enumerate() {
            let found = SampleResult::read(&bytes[row * RESULT_BYTES..]);
            let expected = cpu::logprobs(z, tokenizer_size as usize, targets[row], tops[row]);
            assert!(found.finite && found.id == targets[row]);
            assert_same_logprobs(&found.logprobs, &Some(expected), &format!("vocabulary {vocab}, row {row}"));
        }
    }
}
