//! KV blocks out of device memory and into it, through pinned buffers, on a copy stream of their own. A read waits for the
//! steps enqueued before it, a write holds back those enqueued after it; neither waits on the host. Where a block leaves and
//! where it has landed the device hashes its leaves on the same stream. A thread answers each as its copy has passed.

use super::{
    device::{Address, Device, Memory, device},
    digest::{self, Rows},
    fault::text,
    host::{Pinned, copy_down, event},
};
use crate::Error;
use bytes::{Buf, Bytes};
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, sys};
use kv::{BlockId, Digest, KvError, KvLayout, Payload, Reply};
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
    /// Of the block that the copy stream is at, u64 each.
    leaves: Memory,
    free: mpsc::Receiver<Buffer>,
    passing: mpsc::Sender<Passing>,
}

/// Where a block passes through the host: its bytes, and the leaves that the device has hashed.
struct Buffer {
    bytes: Pinned,
    leaves: Pinned,
}

/// A copy that has been enqueued.
struct Passing {
    done: CudaEvent,
    buffer: Buffer,
    rows: Rows,
    reply: Answer,
}

enum Answer {
    Read(Reply<Payload>),
    /// What the device must find where it landed.
    Written(Digest, Reply<()>),
}

impl KvPool {
    pub fn new(device: &Device, layout: KvLayout, blocks: u32) -> Result<KvPool, Error> {
        digest::check(token_bytes(&layout), layout.block_bytes())?;
        let memory = device.alloc(layout.block_bytes() * blocks as usize)?;
        device.fill(&memory, 0)?;
        device.synchronize()?;
        let stream = device.context.new_stream().map_err(super::device::device)?;
        let leaf_bytes = 8 * layout.block_bytes().div_ceil(Digest::LEAF);
        let leaves = device.alloc(leaf_bytes)?;
        let (returned, free) = mpsc::channel();
        for _ in 0..BUFFERS {
            let bytes = Pinned::new(&device.context, layout.block_bytes())?;
            let _ = returned.send(Buffer { bytes, leaves: Pinned::new(&device.context, leaf_bytes)? });
        }
        let (passing, enqueued) = mpsc::channel();
        let context = device.context.clone();
        thread::Builder::new()
            .name("kv-copy".to_owned())
            .spawn(move || answer(&context, &enqueued, &returned))
            .map_err(|error| Error::Device(error.to_string()))?;
        Ok(KvPool { memory, layout, stream, leaves, free, passing })
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
    pub fn read(&self, of: &Device, block: BlockId, rows: u32, reply: Reply<Payload>) -> Result<(), Error> {
        let rows = self.rows(block, rows);
        let enqueue = |buffer: &mut Buffer| {
            self.follow(of)?;
            self.hash(of, rows, buffer)?;
            self.copy(down(rows, buffer.bytes.bytes_mut()))?;
            self.passed(of)
        };
        self.run(rows, enqueue, Answer::Read(reply))
    }

    /// Copies `payload` in, before everything enqueued later.
    pub fn write(
        &self,
        of: &Device,
        block: BlockId,
        rows: u32,
        payload: Payload,
        reply: Reply<()>,
    ) -> Result<(), Error> {
        let rows = self.rows(block, rows);
        let enqueue = |buffer: &mut Buffer| {
            payload.bytes.reader().copy_to_slice(&mut buffer.bytes.bytes_mut()[..payload.bytes.len()]);
            self.follow(of)?;
            self.copy(up(rows, buffer.bytes.bytes()))?;
            self.hash(of, rows, buffer)?;
            let done = self.passed(of)?;
            of.stream.wait(&done).map_err(device)?;
            Ok(done)
        };
        self.run(rows, enqueue, Answer::Written(payload.digest, reply))
    }

    /// Hashes what lies in the block when the copy stream comes to it.
    fn hash(&self, of: &Device, rows: Rows, buffer: &mut Buffer) -> Result<(), Error> {
        digest::leaves(of, &self.stream, rows, self.leaves.address())?;
        let to = &mut buffer.leaves.bytes_mut()[..8 * rows.leaves()];
        copy_down(&self.stream, self.leaves.address(), to)
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
        rows: Rows,
        enqueue: impl FnOnce(&mut Buffer) -> Result<CudaEvent, Error>,
        reply: Answer,
    ) -> Result<(), Error> {
        let lost = |error: Error, reply: Answer| {
            reply.fail(&error.to_string());
            Err(error)
        };
        let Ok(mut buffer) = self.free.recv() else {
            return lost(Error::Device("the copying thread has ended".to_string()), reply);
        };
        match enqueue(&mut buffer) {
            // A thread that has ended drops the reply, which says that the device has stopped.
            Ok(done) => drop(self.passing.send(Passing { done, buffer, rows, reply })),
            Err(error) => {
                // A copy may be on its way out of it; the worker ends.
                std::mem::forget(buffer);
                return lost(error, reply);
            }
        }
        Ok(())
    }

    /// `rows` tokens of each layer: as many runs, a block's stride apart here and dense on the host.
    fn rows(&self, block: BlockId, rows: u32) -> Rows {
        let token = token_bytes(&self.layout);
        Rows {
            block: self.memory.address() + block as u64 * self.layout.block_bytes() as u64,
            width: rows as usize * token,
            stride: self.layout.block_tokens as usize * token,
            layers: self.layout.layers as usize,
        }
    }

    fn copy(&self, copy: sys::CUDA_MEMCPY2D) -> Result<(), Error> {
        // SAFETY: both sides have the extent of the rows; the buffer lives until the event behind the copy has passed.
        unsafe { sys::cuMemcpy2DAsync_v2(&copy, self.stream.cu_stream()) }.result().map_err(device)
    }
}

fn token_bytes(layout: &KvLayout) -> usize {
    layout.row as usize * layout.dtype.bytes()
}

fn down(rows: Rows, to: &mut [u8]) -> sys::CUDA_MEMCPY2D {
    sys::CUDA_MEMCPY2D {
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcDevice: rows.block,
        srcPitch: rows.stride,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        dstHost: to[..rows.bytes()].as_mut_ptr().cast(),
        dstPitch: rows.width,
        ..extent(rows)
    }
}

fn up(rows: Rows, from: &[u8]) -> sys::CUDA_MEMCPY2D {
    sys::CUDA_MEMCPY2D {
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
        srcHost: from[..rows.bytes()].as_ptr().cast(),
        srcPitch: rows.width,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstDevice: rows.block,
        dstPitch: rows.stride,
        ..extent(rows)
    }
}

fn extent(rows: Rows) -> sys::CUDA_MEMCPY2D {
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
        WidthInBytes: rows.width,
        Height: rows.layers,
    }
}

impl Buffer {
    fn digest(&self, rows: Rows) -> Digest {
        let leaves = self.leaves.bytes()[..8 * rows.leaves()].as_chunks::<8>().0;
        Digest::of_leaves(leaves.iter().map(|leaf| u64::from_le_bytes(*leaf)), rows.bytes())
    }
}

impl Answer {
    fn give(self, buffer: &Buffer, rows: Rows) {
        let digest = buffer.digest(rows);
        match self {
            Answer::Read(reply) => {
                let bytes = Bytes::copy_from_slice(&buffer.bytes.bytes()[..rows.bytes()]);
                drop(reply.send(Ok(Payload { bytes: bytes.into(), digest })));
            }
            Answer::Written(sent, reply) => drop(reply.send(digest.expect(sent))),
        }
    }

    fn fail(self, why: &str) {
        let error = KvError::Stopped(why.to_string());
        match self {
            Answer::Read(reply) => drop(reply.send(Err(error))),
            Answer::Written(_, reply) => drop(reply.send(Err(error))),
        }
    }
}

/// Until the pool is gone. Whoever asked may have stopped waiting.
fn answer(context: &Arc<CudaContext>, enqueued: &mpsc::Receiver<Passing>, free: &mpsc::Sender<Buffer>) {
    let _ = context.bind_to_thread();
    for Passing { done, buffer, rows, reply } in enqueued {
        match done.synchronize() {
            Ok(()) => reply.give(&buffer, rows),
            Err(error) => reply.fail(&text(error)),
        }
        let _ = free.send(buffer);
    }
}
