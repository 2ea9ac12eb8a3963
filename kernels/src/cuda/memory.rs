//! What the backend keeps on the device between operations: activations, the pool, slots, scratch, and the ring through
//! which results come back.

use super::{
    backend::LOGPROB_ROWS,
    device::{Address, Device, Memory, device},
    elementwise::PoolLayer,
    graphs::Graphs,
    host::{Pinned, Staging, copy_down, event},
    sample::{self, SamplerState},
    scratch::Scratch,
    step::{Known, Step, StepMemory},
    transfer::KvPool,
};
use crate::{Error, Shape, StepInput};
use cudarc::driver::CudaEvent;
use kv::KvDtype;

/// Steps whose results may be uncollected, and one more that is being put together.
const RING: usize = 3;

/// Activations in bf16, or logits in f32.
pub struct Buffer {
    memory: Memory,
    pub width: u32,
}

impl Buffer {
    pub fn new(device: &Device, rows: usize, width: usize, element: usize) -> Result<Buffer, Error> {
        Ok(Buffer { memory: device.alloc(rows * width * element)?, width: width as u32 })
    }

    pub fn address(&self) -> Address {
        self.memory.address()
    }
}

/// Present from `prepare` on.
pub struct Prepared {
    pub shape: Shape,
    pub pool: KvPool,
    pub slots: SamplerState,
    pub step: StepMemory,
    pub scratch: Scratch,
    pub graphs: Graphs,
    /// `[max_sequences]`, then `[max_step_tokens]` for prompt logprobs.
    pub results: Memory,
    pub ring: Ring,
    pub known: Known,
    /// Results of the step that was uploaded last: sampled, and of prompts.
    expected: (usize, usize),
}

impl Prepared {
    pub fn new(device: &Device, shape: Shape) -> Result<Prepared, Error> {
        let step = StepMemory::new(device, &shape)?;
        let results = (shape.max_sequences + shape.max_step_tokens) as usize * sample::RESULT_BYTES;
        // Row, target and count of every prompt logprob beside the step itself.
        let staging = step.staging_bytes() + 16 * shape.max_step_tokens as usize;
        Ok(Prepared {
            pool: KvPool::new(device, shape.layout(KvDtype::Bf16), shape.blocks)?,
            slots: SamplerState::new(device, shape.max_sequences, shape.vocab)?,
            results: device.alloc(results)?,
            ring: Ring::new(device, staging, results)?,
            scratch: Scratch::default(),
            graphs: Graphs::default(),
            known: Known::new(shape.max_sequences),
            expected: (0, 0),
            step,
            shape,
        })
    }

    /// The old pool goes first: both may not fit. Recorded steps have its address.
    pub fn resize_pool(&mut self, device: &Device, blocks: u32) -> Result<(), Error> {
        device.synchronize()?;
        self.graphs.forget();
        self.known = Known::new(self.shape.max_sequences);
        self.shape.blocks = blocks;
        self.pool.resize(device, blocks)
    }

    /// Makes `step` resident.
    pub fn upload(&mut self, device: &Device, step: &StepInput) -> Result<Step, Error> {
        let wanted_at = self.room(device, "wanted", 16 * self.max_rows())?;
        let ring = self.ring.take()?;
        let staging = &mut self.ring.place(ring).staging;
        let extent = self.step.upload(device, step, staging)?;
        let uploaded = Step::new(step, extent, ring, wanted_at);
        staging.send(device, &uploaded.wanted_words(LOGPROB_ROWS), wanted_at)?;
        // The staging is free when this event has passed; `collect` moves it behind the results.
        self.ring.place(ring).done.record(&device.stream).map_err(super::device::device)?;
        sample::resolve(device, &self.step.addresses, &extent, &self.slots)?;
        let sampling = step.entries.iter().filter(|entry| entry.sample).count();
        self.expected = (sampling, uploaded.wanted.len());
        Ok(uploaded)
    }

    /// Enqueues the way down of the results of the step that was uploaded last.
    pub fn collect(&mut self, device: &Device) -> Result<(), Error> {
        let (sampled, prompt) = self.expected;
        let (from, prompts_from) = (self.results.address(), self.prompt_results());
        let prompts_at = self.shape.max_sequences as usize * sample::RESULT_BYTES;
        let place = self.ring.last();
        let bytes = place.results.bytes_mut();
        copy_down(&device.stream, from, &mut bytes[..sampled * sample::RESULT_BYTES])?;
        copy_down(&device.stream, prompts_from, &mut bytes[prompts_at..][..prompt * sample::RESULT_BYTES])?;
        place.done.record(&device.stream).map_err(super::device::device)
    }

    /// Scratch memory of at least `bytes`; its name says what for.
    pub fn room(&mut self, device: &Device, name: &'static str, bytes: usize) -> Result<Address, Error> {
        self.scratch.room(device, &mut self.graphs, name, bytes)
    }

    pub fn max_rows(&self) -> usize {
        self.shape.max_step_tokens as usize
    }

    pub fn layer(&self, layer: usize) -> PoolLayer {
        PoolLayer {
            pool: self.pool.address(),
            layers: self.shape.layers,
            layer: layer as u32,
            block_tokens: self.shape.block_tokens,
            latent: self.shape.latent,
            rope: self.shape.rope,
        }
    }

    /// Results of prompt logprobs.
    pub fn prompt_results(&self) -> Address {
        self.results.address() + u64::from(self.shape.max_sequences) * sample::RESULT_BYTES as u64
    }
}

/// Pinned memory of the last few steps: metadata on its way up, results on their way down.
pub struct Ring {
    places: Vec<Place>,
    next: usize,
}

pub struct Place {
    pub staging: Staging,
    pub results: Pinned,
    pub done: CudaEvent,
}

impl Ring {
    fn new(device: &Device, staging: usize, results: usize) -> Result<Ring, Error> {
        let place = |_| {
            Ok(Place {
                staging: Staging::new(&device.context, staging)?,
                results: Pinned::new(&device.context, results)?,
                done: event(&device.context)?,
            })
        };
        Ok(Ring { places: (0..RING).map(place).collect::<Result<_, Error>>()?, next: 0 })
    }

    /// The place of the next step, which nothing uses any more.
    pub fn take(&mut self) -> Result<usize, Error> {
        let index = self.next;
        self.next = (index + 1) % RING;
        let place = &mut self.places[index];
        place.done.synchronize().map_err(device)?;
        place.staging.clear();
        Ok(index)
    }

    pub fn place(&mut self, index: usize) -> &mut Place {
        &mut self.places[index]
    }

    /// Of the step that was uploaded last.
    fn last(&mut self) -> &mut Place {
        &mut self.places[(self.next + RING - 1) % RING]
    }

    /// Waits for a step and shows its results.
    pub fn results(&mut self, index: usize) -> Result<&[u8], Error> {
        let place = &self.places[index];
        place.done.synchronize().map_err(device)?;
        Ok(place.results.bytes())
    }
}
