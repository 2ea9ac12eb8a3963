//! KV blocks out of device memory and into it, through pinned buffers, on a copy stream of their own. A read waits for the
//! steps enqueued before it, a write holds back those enqueued after it; neither waits on the host. A thread answers
//! each as its copy has passed.

use super::{
    device::{Address, Device, Memory, device},
    host::{Pinned, event},
};
use crate::Error;
use bytes::Bytes;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};
use kv::{BlockId, KvError, KvLayout, Reply};
use std::{
    sync::{Arc, mpsc},
    thread,
};

/// Blocks on their way at once. Asking for more waits for one of them.
const BUFFERS: usize = 16;

/// The KV pool, `[block][layer][token][latent + rope]` bf16, and the ways to it.
pub struct KvPool {
    memory: Memory,
    layout: KvLayout,
    stream: Arc<CudaStream>,
    free: mpsc::Receiver<Pinned>,
    passing: mpsc::Sender<Passing>,
}

/// A copy that has been enqueued.
struct Passing {
    done: CudaEvent,
    buffer: Pinned,
    reply: Answer,
}

enum Answer {
    Read(usize, Reply<Bytes>),
    Written(Reply<()>),
}

impl KvPool {
    pub fn new(device: &Device, layout: KvLayout, blocks: u32) -> Result<KvPool, Error> {
        let memory = device.alloc(layout.block_bytes() * blocks as usize)?;
        device.fill(&memory, 0)?;
        device.synchronize()?;
        let stream = device.context.new_stream().map_err(super::device::device)?;
        let (returned, free) = mpsc::channel();
        for _ in 0..BUFFERS {
            let _ = returned.send(Pinned::new(&device.context, layout.block_bytes())?);
        }
        let (passing, enqueued) = mpsc::channel();
        let context = device.context.clone();
        thread::Builder::new()
            .name("kv-copy".to_owned())
            .spawn(move || answer(&context, &enqueued, &returned))
            .map_err(|error| Error::Device(error.to_string()))?;
        Ok(KvPool { memory, layout, stream, free, passing })
    }

    /// Another number of blocks, all empty. The old memory goes first: both may not fit.
    pub fn resize(&mut self, device: &Device, blocks: u32) -> Result<(), Error> {
        self.memory = device.alloc(0)?;
        self.memory = device.alloc(self.layout.block_bytes() * blocks as usize)?;
        device.fill(&self.memory, 0)
    }

    pub fn address(&self) -> Address {
        self.memory.address()
    }

    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Copies out the first `rows` tokens of every layer, as they are after everything enqueued so far. Whoever asks
    /// holds the block until it has the copy, so that later steps need not wait.
    pub fn read(&self, of: &Device, block: BlockId, rows: u32, reply: Reply<Bytes>) {
        let enqueue = |buffer: &mut Pinned| {
            self.follow(of)?;
            self.copy(self.plan(block, rows, buffer.bytes_mut().as_mut_ptr()).down())?;
            self.passed(of)
        };
        self.run(enqueue, None, Answer::Read(self.layout.payload_bytes(rows), reply));
    }

    /// Copies `payload` in, before everything enqueued later.
    pub fn write(&self, of: &Device, block: BlockId, rows: u32, payload: &Bytes, reply: Reply<()>) {
        let enqueue = |buffer: &mut Pinned| {
            self.follow(of)?;
            self.copy(self.plan(block, rows, buffer.bytes_mut().as_mut_ptr()).up())?;
            let done = self.passed(of)?;
            of.stream.wait(&done).map_err(device)?;
            Ok(done)
        };
        self.run(enqueue, Some(payload), Answer::Written(reply));
    }

    /// The copy stream goes on when the steps enqueued so far have run.
    fn follow(&self, of: &Device) -> Result<(), Error> {
        of.context.bind_to_thread().map_err(device)?;
        let after = event(&of.context)?;
        after.record(&of.stream).map_err(device)?;
        self.stream.wait(&after).map_err(device)
    }

    /// An event behind the last copy.
    fn passed(&self, of: &Device) -> Result<CudaEvent, Error> {
        let done = event(&of.context)?;
        done.record(&self.stream).map_err(device)?;
        Ok(done)
    }

    fn run(
        &self,
        enqueue: impl FnOnce(&mut Pinned) -> Result<CudaEvent, Error>,
        payload: Option<&Bytes>,
        reply: Answer,
    ) {
        let Ok(mut buffer) = self.free.recv() else {
            return reply.fail("the copying thread has ended");
        };
        if let Some(payload) = payload {
            buffer.bytes_mut()[..payload.len()].copy_from_slice(payload);
        }
        match enqueue(&mut buffer) {
            // A thread that has ended drops the reply, which says that the device has stopped.
            Ok(done) => drop(self.passing.send(Passing { done, buffer, reply })),
            Err(error) => reply.fail(&error.to_string()),
        }
    }

    /// `rows` tokens of each layer: as many runs, a block's stride apart here and dense on the host.
    fn plan(&self, block: BlockId, rows: u32, host: *mut u8) -> Plan {
        let token = self.layout.row as usize * self.layout.dtype.bytes();
        Plan {
            device: self.memory.address() + block as u64 * self.layout.block_bytes() as u64,
            host,
            width: rows as usize * token,
            stride: self.layout.block_tokens as usize * token,
            layers: self.layout.layers as usize,
        }
    }

    fn copy(&self, copy: sys::CUDA_MEMCPY2D) -> Result<(), Error> {
        // SAFETY: both sides have the extent of the plan; the buffer lives until the event behind the copy has passed.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.cu_stream()) }.result().map_err(device)
    }
}

struct Plan {
    device: Address,
    host: *mut u8,
    width: usize,
    stride: usize,
    layers: usize,
}

impl Plan {
    fn down(&self) -> sys::CUDA_MEMCPY2D {
        sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcDevice: self.device,
            srcPitch: self.stride,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: self.host.cast(),
            dstPitch: self.width,
            ..self.extent()
        }
    }

    fn up(&self) -> sys::CUDA_MEMCPY2D {
        sys::CUDA_MEMCPY2D {
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: self.host.cast_const().cast(),
            srcPitch: self.width,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstDevice: self.device,
            dstPitch: self.stride,
            ..self.extent()
        }
    }

    fn extent(&self) -> sys::CUDA_MEMCPY2D {
        sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: std::ptr::null(),
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: 0,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
            dstHost: std::ptr::null_mut(),
            dstDevice: 0,
            dstArray: std::ptr::null_mut(),
            dstPitch: 0,
            WidthInBytes: self.width,
            Height: self.layers,
        }
    }
}

impl Answer {
    fn fail(self, why: &str) {
        let error = KvError::Stopped(why.to_string());
        match self {
            Answer::Read(_, reply) => drop(reply.send(Err(error))),
            Answer::Written(reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Until the pool is gone. Whoever asked may have stopped waiting.
fn answer(context: &Arc<CudaContext>, enqueued: &mpsc::Receiver<Passing>, free: &mpsc::Sender<Pinned>) {
    let _ = context.bind_to_thread();
    for Passing { done, buffer, reply } in enqueued {
        match (done.synchronize(), reply) {
            (Ok(()), Answer::Read(bytes, reply)) => {
                drop(reply.send(Ok(Bytes::copy_from_slice(&buffer.bytes()[..bytes]))));
            }
            (Ok(()), Answer::Written(reply)) => drop(reply.send(Ok(()))),
            (Err(error), reply) => reply.fail(&error.to_string()),
        }
        let _ = free.send(buffer);
    }
}
