//! A pool that knows what landed in it, and in which writing can fail, damage or wait.

use bytes::Bytes;
use kv::{BlockId, Digest, KvDtype, KvError, KvLayout, KvMemory, Payload, Region, StepId, Transfer};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
};

pub const LAYOUT: KvLayout = KvLayout { dtype: KvDtype::F32, layers: 3, block_tokens: 4, row: 100 };
const BLOCKS: u32 = 64;

pub struct Memory {
    pool: Arc<Vec<AtomicU8>>,
    /// What landed, by block.
    pub blocks: Mutex<HashMap<BlockId, Bytes>>,
    /// Blocks whose next write fails.
    pub broken: Mutex<HashSet<BlockId>>,
    /// Blocks in whose next write a bit flips.
    pub flaky: Mutex<HashSet<BlockId>>,
    /// Blocks whose writes wait for [`Memory::land`].
    pub slow: Mutex<HashSet<BlockId>>,
    /// Blocks that earlier steps hold on to until [`Memory::land`].
    pub busy: Mutex<HashSet<BlockId>>,
    pub waiting: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
    /// Writes so far, by block. What was read from elsewhere counts when it is looked at.
    pub writes: Mutex<HashMap<BlockId, u32>>,
}

impl Memory {
    pub fn new() -> Self {
        let bytes = LAYOUT.block_bytes() * BLOCKS as usize;
        Memory {
            pool: Arc::new((0..bytes).map(|_| AtomicU8::new(0)).collect()),
            blocks: Mutex::default(),
            broken: Mutex::default(),
            flaky: Mutex::default(),
            slow: Mutex::default(),
            busy: Mutex::default(),
            waiting: Mutex::default(),
            writes: Mutex::default(),
        }
    }

    /// Lets waiting writes end.
    pub fn land(&self) {
        self.waiting.lock().unwrap().drain(..).for_each(|ended| ended());
    }

    pub fn put(&self, block: BlockId, rows: u32, bytes: &[u8]) {
        self.cells(block, rows).zip(bytes).for_each(|(cell, byte)| cell.store(*byte, Relaxed));
    }

    pub fn get(&self, block: BlockId, rows: u32) -> Bytes {
        self.cells(block, rows).map(|cell| cell.load(Relaxed)).collect()
    }

    fn cells(&self, block: BlockId, rows: u32) -> impl Iterator<Item = &AtomicU8> {
        let begin = block as usize * LAYOUT.block_bytes();
        LAYOUT.runs(rows).into_iter().flat_map(move |run| &self.pool[begin + run.at..][..run.bytes])
    }

    /// What became of the bytes that lie in `block`.
    fn landed(&self, block: BlockId, rows: u32) -> Result<Digest, KvError> {
        *self.writes.lock().unwrap().entry(block).or_default() += 1;
        if self.broken.lock().unwrap().remove(&block) {
            return Err(KvError::Stopped("a bad cell".into()));
        }
        if self.flaky.lock().unwrap().remove(&block) {
            self.cells(block, rows).nth(17).unwrap().fetch_xor(1, Relaxed);
        }
        let bytes = self.get(block, rows);
        let digest = Digest::of(&bytes);
        self.blocks.lock().unwrap().insert(block, bytes);
        Ok(digest)
    }

    fn ends<T: Send + 'static>(&self, block: BlockId, result: Result<T, KvError>) -> Transfer<T> {
        let (reply, transfer) = kv::transfer();
        if result.is_ok() && self.slow.lock().unwrap().contains(&block) {
            self.waiting.lock().unwrap().push(Box::new(move || drop(reply.send(result))));
        } else {
            let _ = reply.send(result);
        }
        transfer
    }
}

impl KvMemory for Memory {
    fn layout(&self) -> KvLayout {
        LAYOUT
    }

    fn blocks(&self) -> u32 {
        BLOCKS
    }

    fn read(&self, block: BlockId, rows: u32, _: StepId) -> Transfer<Payload> {
        self.ends(block, Ok(Payload::new(self.get(block, rows))))
    }

    fn write(&self, block: BlockId, rows: u32, payload: Payload, _: StepId) -> Transfer<()> {
        self.put(block, rows, &payload.bytes.together());
        let intact = self.landed(block, rows).and_then(|found| found.expect(payload.digest));
        self.ends(block, intact)
    }

    fn region(&self) -> Option<Region> {
        Some(Region::new(self.pool.as_ptr() as usize, self.pool.len(), self.pool.clone()))
    }

    fn digest(&self, block: BlockId, rows: u32, _: StepId) -> Transfer<Digest> {
        let (reply, transfer) = kv::transfer();
        if rows > 0 {
            return self.ends(block, self.landed(block, rows));
        }
        if self.busy.lock().unwrap().contains(&block) {
            self.waiting.lock().unwrap().push(Box::new(move || drop(reply.send(Ok(Digest(0))))));
        } else {
            let _ = reply.send(Ok(Digest(0)));
        }
        transfer
    }
}
