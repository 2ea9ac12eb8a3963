//! Launchers of `kernels/cuda/sample.cu`, and the sampler state that stays in device memory.

use super::{
    device::{Address, Args, Device, Grid, Memory, device as failed},
    host::{Pinned, copy_up, event},
    step::{Extent, StepAddresses},
};
use crate::{
    Error, Logprobs, MAX_BIASES, MAX_LOGPROBS, MAX_SUPPRESSED, SampledToken, Sampling, SlotInit, TokenLogprob,
};
use cudarc::driver::CudaEvent;

pub(super) const KERNELS: &[&str] = &["sample_rows", "sample_logprobs", "sample_resolve"];

/// Bytes of a [`SampleResult`] on the device.
pub const RESULT_BYTES: usize = 4 * (4 + 3 + 3 * MAX_LOGPROBS as usize);

const THREADS: u32 = 1024;
const PARAMETERS: usize = 16;
/// Of a slot, before its history.
const HEAD_BYTES: usize = 4 * (PARAMETERS + MAX_SUPPRESSED + 2 * MAX_BIASES);
/// In a history's words: the prompt has the id. The bits below count it in the output, up to 32767.
const IN_PROMPT: u16 = 1 << 15;
const MAX_COUNT: u16 = IN_PROMPT - 1;

/// Parameters, bias, suppressed ids and history of every slot, and the token that each sampled last.
/// Takes `slots × (12612 + 2 × vocab)` bytes or a little more: 69 MB for 256 slots and 129 280 ids.
pub struct SamplerState {
    slots: Memory,
    last: Memory,
    vocab: u32,
    /// Host memory on its way to the device, and what is free again.
    staged: Vec<Staged>,
}

struct Staged {
    pinned: Pinned,
    passed: CudaEvent,
}

impl SamplerState {
    pub fn new(device: &Device, slots: u32, vocab: u32) -> Result<SamplerState, Error> {
        let (memory, last) =
            (device.alloc(slots as usize * stride(vocab))?, device.alloc(4 * slots as usize)?);
        device.fill(&memory, 0)?;
        device.fill(&last, 0)?;
        Ok(SamplerState { slots: memory, last, vocab, staged: Vec::new() })
    }

    /// u32 per slot: the token sampled last.
    pub fn last(&self) -> Address {
        self.last.address()
    }

    /// Enqueues the copies that give a slot its state. `init` is within the limits of [`Sampling::check`].
    pub fn init_slot(&mut self, device: &Device, init: &SlotInit) -> Result<(), Error> {
        let penalized = init.sampling.has_penalties();
        let bytes = HEAD_BYTES + if penalized { 2 * self.vocab as usize } else { 0 };
        let to = self.slots.address() + (init.slot as usize * stride(self.vocab)) as u64;
        let vocab = self.vocab as usize;
        let staged = self.stage(device, bytes)?;
        let space = &mut staged.pinned.bytes_mut()[..bytes];
        write_head(init, &mut space[..HEAD_BYTES]);
        if penalized {
            write_history(init, vocab, &mut space[HEAD_BYTES..]);
        }
        copy_up(&device.stream, to, space)?;
        staged.passed.record(&device.stream).map_err(failed)
    }

    /// The smallest room that nothing on its way occupies, or a new one.
    fn stage(&mut self, device: &Device, bytes: usize) -> Result<&mut Staged, Error> {
        let fits = |staged: &Staged| staged.pinned.bytes().len() >= bytes && staged.passed.is_complete();
        let rooms = self.staged.iter().enumerate().filter(|(_, staged)| fits(staged));
        let index = match rooms.min_by_key(|(_, staged)| staged.pinned.bytes().len()) {
            Some((index, _)) => index,
            None => {
                let (pinned, passed) = (Pinned::new(&device.context, bytes)?, event(&device.context)?);
                self.staged.push(Staged { pinned, passed });
                self.staged.len() - 1
            }
        };
        Ok(&mut self.staged[index])
    }
}

fn stride(vocab: u32) -> usize {
    (HEAD_BYTES + 2 * vocab as usize).next_multiple_of(16)
}

/// `struct Slot` of the device code.
fn write_head(init: &SlotInit, space: &mut [u8]) {
    let words = parameters(init).into_iter();
    let suppress = padded(init.sampling.suppress.iter().copied(), MAX_SUPPRESSED);
    let ids = padded(init.sampling.logit_bias.iter().map(|(id, _)| *id), MAX_BIASES);
    let values = padded(init.sampling.logit_bias.iter().map(|(_, bias)| bias.to_bits()), MAX_BIASES);
    let words = words.chain(suppress).chain(ids).chain(values);
    for (space, word) in space.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *space = word.to_le_bytes();
    }
}

fn padded(words: impl Iterator<Item = u32>, length: usize) -> impl Iterator<Item = u32> {
    words.chain(std::iter::repeat(0)).take(length)
}

/// `struct Parameters` of the device code.
fn parameters(init: &SlotInit) -> [u32; PARAMETERS] {
    let s: &Sampling = &init.sampling;
    [
        s.temperature.to_bits(),
        s.top_p.to_bits(),
        s.min_p.to_bits(),
        s.presence_penalty.to_bits(),
        s.frequency_penalty.to_bits(),
        s.repetition_penalty.to_bits(),
        s.top_k,
        s.choice,
        s.seed as u32,
        (s.seed >> 32) as u32,
        s.min_tokens,
        init.prompt_len,
        s.logprobs.unwrap_or(u32::MAX),
        s.suppress.len() as u32,
        s.logit_bias.len() as u32,
        s.has_penalties().into(),
    ]
}

fn write_history(init: &SlotInit, vocab: usize, space: &mut [u8]) {
    let mut history = vec![0u16; vocab];
    for (index, token) in init.tokens.iter().enumerate() {
        let Some(count) = history.get_mut(*token as usize) else { continue };
        match index < init.prompt_len as usize {
            true => *count |= IN_PROMPT,
            false if *count & MAX_COUNT < MAX_COUNT => *count += 1,
            false => (),
        }
    }
    for (space, count) in space.as_chunks_mut::<2>().0.iter_mut().zip(history) {
        *space = count.to_le_bytes();
    }
}

/// Scratch of [`sample`].
pub fn sample_scratch_bytes(samples: u32, vocab: u32) -> usize {
    4 * samples as usize * vocab as usize
}

/// Chooses the next token of every entry that samples: from `logits`, f32 `[samples][vocab]`, of which ids below
/// `tokenizer_size` count, into `results`, `[samples]` of [`RESULT_BYTES`]. It becomes the slot's last and part of its
/// history. `scratch` is of [`sample_scratch_bytes`].
#[allow(clippy::too_many_arguments)]
pub fn sample(
    device: &Device,
    at: &StepAddresses,
    extent: &Extent,
    state: &SamplerState,
    logits: Address,
    tokenizer_size: u32,
    scratch: Address,
    results: Address,
) -> Result<(), Error> {
    if extent.samples == 0 {
        return Ok(());
    }
    let args = Args::default()
        .ptr(at.counts)
        .ptr(at.sample_entry)
        .ptr(at.slot)
        .ptr(at.start)
        .ptr(at.row_count)
        .ptr(logits)
        .u32(state.vocab)
        .u32(tokenizer_size)
        .ptr(state.slots.address())
        .u64(stride(state.vocab) as u64)
        .ptr(scratch)
        .ptr(state.last.address())
        .ptr(results);
    device.launch("sample_rows", Grid::new([extent.samples, 1, 1], THREADS), args)
}

/// Reports on given tokens: for every row of `logits`, f32 `[rows][vocab]`, the token of `targets` (u32 `[rows]`, below
/// `vocab`) and as many of the largest as `tops` says (u32 `[rows]`), into `results`, `[rows]` of [`RESULT_BYTES`].
#[allow(clippy::too_many_arguments)]
pub fn logprobs(
    device: &Device,
    rows: u32,
    logits: Address,
    vocab: u32,
    tokenizer_size: u32,
    targets: Address,
    tops: Address,
    results: Address,
) -> Result<(), Error> {
    if rows == 0 {
        return Ok(());
    }
    let args = Args::default().ptr(logits).u32(vocab).u32(tokenizer_size).ptr(targets).ptr(tops).ptr(results);
    device.launch("sample_logprobs", Grid::new([rows, 1, 1], THREADS), args)
}

/// Replaces [`super::step::SAMPLED`] among the tokens of a step by what the slots sampled last.
pub fn resolve(
    device: &Device,
    at: &StepAddresses,
    extent: &Extent,
    state: &SamplerState,
) -> Result<(), Error> {
    if extent.rows == 0 {
        return Ok(());
    }
    let args = Args::default()
        .ptr(at.counts)
        .ptr(at.tokens)
        .ptr(at.entry_of_row)
        .ptr(at.slot)
        .ptr(state.last.address());
    device.launch("sample_resolve", Grid::new([extent.rows.div_ceil(256), 1, 1], 256), args)
}

/// What a row gave, as the host reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleResult {
    pub id: u32,
    /// Otherwise the logits are corrupt and `id` means nothing.
    pub finite: bool,
    /// If asked for.
    pub logprobs: Option<Logprobs>,
}

impl SampleResult {
    /// From the [`RESULT_BYTES`] that the device wrote.
    pub fn read(bytes: &[u8]) -> SampleResult {
        let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let entry = |index: usize| TokenLogprob {
            token: words[4 + 3 * index],
            logprob: f32::from_bits(words[5 + 3 * index]),
            rank: words[6 + 3 * index],
        };
        let listed = words[3].min(MAX_LOGPROBS) as usize;
        let logprobs =
            (words[2] != 0).then(|| Logprobs { token: entry(0), top: (1..=listed).map(entry).collect() });
        SampleResult { id: words[0], finite: words[1] != 0, logprobs }
    }

    /// `None` if the logits were not finite.
    pub fn sampled(self) -> Option<SampledToken> {
        self.finite.then_some(SampledToken { id: self.id, logprobs: self.logprobs })
    }
}
