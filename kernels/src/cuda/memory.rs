//! What the backend keeps on the device between operations: activations, the pool, slots, scratch, and the ring through
//! which results come back.

use super::{
    device::{Address, Device, Memory, device},
    graphs::Graphs,
    host::{Pinned, Staging, copy_down, event},
    sample::{self, SamplerState},
    scratch::Scratch,
    step::StepMemory,
    transfer::KvPool,
};
use crate::{Error, Shape};
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
}

impl Prepared {
    pub fn new(device: &Device, shape: Shape) -> Result<Prepared, Error> {
        let step = StepMemory::new(device, &shape)?;
        let results = (shape.max_sequences + shape.max_step_tokens) as usize * sample::RESULT_BYTES;
        // Row, target and count of every prompt logprob beside the step itself.
        let staging = step.staging_bytes() + 12 * shape.max_step_tokens as usize;
        Ok(Prepared {
            pool: KvPool::new(device, shape.layout(KvDtype::Bf16), shape.blocks)?,
            slots: SamplerState::new(device, shape.max_sequences, shape.vocab)?,
            results: device.alloc(results)?,
            ring: Ring::new(device, staging, results)?,
            scratch: Scratch::default(),
            graphs: Graphs::default(),
            step,
            shape,
        })
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

    /// The place of the step that was uploaded last.
    pub fn last(&self) -> usize {
        (self.next + RING - 1) % RING
    }
}

impl Place {
    /// Enqueues the way down of all results, and the event behind it.
    pub fn collect(&mut self, of: &Device, results: &Memory) -> Result<(), Error> {
        copy_down(&of.stream, results.address(), self.results.bytes_mut())?;
        self.done.record(&of.stream).map_err(device)
    }
}
