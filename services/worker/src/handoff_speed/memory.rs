//! The memories that are measured: plain host memory, with digests and without, and the pool of the real backend behind the
//! real executor, with as many layers as make a block of the size asked for.

use crate::{Error, load};
use bytes::Buf;
use handoff::{direct::Direct, nixl};
use kv::{
    BlockId, Digest, HashedCopy, KvDtype, KvError, KvLayout, KvMemory, Payload, Region, Reply, StepId,
    Transfer,
};
use memmap2::MmapMut;
use serde::{Deserialize, Serialize};
use std::{
    collections::{HashMap, hash_map::Entry},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

/// Of a DeepSeek-V3 block.
pub const BLOCK_TOKENS: u32 = 64;
const LATENT: usize = 512;
const ROPE: usize = 64;
/// Reads and writes that wait for the thread that copies.
const COMMANDS: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// Host memory that is copied and believed: what the protocol costs without digests. Only measured, never served.
    HostUnchecked,
    Host,
    /// The KV pool of the backend.
    Backend,
}

/// What the memories of both processes look like.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    pub block_bytes: usize,
    pub blocks: u32,
    /// One of [`crate::BACKENDS`]; `None`: host memory only.
    pub backend: Option<String>,
    /// A file that both processes map: the source of plain copies.
    pub shared: Option<PathBuf>,
}

impl Size {
    /// As many bf16 layers of 64 tokens as come near the rows of DeepSeek-V3, in exactly this size if it is a multiple of
    /// their number.
    pub fn layout(&self) -> KvLayout {
        let layers = layers(self.block_bytes, KvDtype::Bf16);
        let row = (self.block_bytes / (layers as usize * BLOCK_TOKENS as usize * 2)).max(1);
        KvLayout { dtype: KvDtype::Bf16, layers, block_tokens: BLOCK_TOKENS, row: row as u32 }
    }
}

fn layers(block_bytes: usize, dtype: KvDtype) -> u32 {
    let layer = BLOCK_TOKENS as usize * (LATENT + ROPE) * dtype.bytes();
    ((block_bytes + layer / 2) / layer).max(1) as u32
}

/// All memories of one size in one process.
pub struct Memories {
    pub pool: Pool,
    memories: HashMap<Memory, Arc<dyn KvMemory>>,
    /// Opened when first asked for.
    direct: Mutex<HashMap<Memory, Arc<dyn Direct>>>,
}

impl Memories {
    pub fn new(size: &Size) -> Result<Memories, Error> {
        let layout = size.layout();
        let pool = Pool::new(layout.block_bytes(), size.blocks)?;
        let host = |checked| HostMemory::spawn(layout, size.blocks, pool.clone(), checked);
        let mut memories: HashMap<Memory, Arc<dyn KvMemory>> =
            HashMap::from([(Memory::HostUnchecked, host(false)?), (Memory::Host, host(true)?)]);
        if let Some(backend) = &size.backend {
            memories.insert(Memory::Backend, load::pool(backend, &model(size), size.blocks)?);
        }
        Ok(Memories { pool, memories, direct: Mutex::default() })
    }

    /// A memory whose blocks are read through NIXL.
    pub fn nixl(&self, memory: Memory) -> Result<handoff::direct::Pool, Error> {
        let of = self.get(memory)?;
        let mut direct = self.direct.lock().unwrap_or_else(PoisonError::into_inner);
        let open = match direct.entry(memory) {
            Entry::Occupied(open) => open.into_mut(),
            Entry::Vacant(none) => {
                let block_bytes = of.layout().block_bytes();
                let member = format!("bench-handoff-{}-{memory:?}-{block_bytes}", std::process::id());
                none.insert(nixl::open(&member, &*of).map_err(refused)?)
            }
        };
        handoff::direct::Pool::direct(of, open.clone()).map_err(refused)
    }

    pub fn get(&self, memory: Memory) -> Result<Arc<dyn KvMemory>, Error> {
        self.memories.get(&memory).cloned().ok_or_else(|| Error::Measure(format!("{memory:?} was not made")))
    }
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Measure(error.to_string())
}

/// config.json of a model whose blocks have the size on the backend and that is small in everything else.
fn model(size: &Size) -> String {
    let dtype = if size.backend.as_deref() == Some("cuda") { KvDtype::Bf16 } else { KvDtype::F32 };
    serde_json::json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 512,
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": layers(size.block_bytes, dtype),
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": LATENT,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": ROPE, "v_head_dim": 128, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 1024, "attention_bias": false,
        "tie_word_embeddings": false
    })
    .to_string()
}

/// The bytes of the host memories, one block after the other, at the same place as long as there is one of them.
#[derive(Clone)]
pub struct Pool(Arc<Mutex<MmapMut>>);

impl Pool {
    /// The memory that a backend's pool has.
    fn new(block_bytes: usize, blocks: u32) -> Result<Pool, Error> {
        let mut bytes = kernels::cpu::mapped(block_bytes * blocks as usize).map_err(refused)?;
        fill(&mut bytes);
        Ok(Pool(Arc::new(Mutex::new(bytes))))
    }

    pub fn lock(&self) -> MutexGuard<'_, MmapMut> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region(&self) -> Region {
        let pool = self.lock();
        Region::new(pool.as_ptr() as usize, pool.len(), self.0.clone())
    }
}

/// Every page is written, so that no later copy pays for it.
pub fn fill(bytes: &mut [u8]) {
    bytes.iter_mut().enumerate().for_each(|(index, byte)| *byte = (index >> 12) as u8 | 1);
}

/// One thread copies, in the order of asking, as the executor's does.
struct HostMemory {
    layout: KvLayout,
    blocks: u32,
    region: Region,
    commands: SyncSender<Command>,
}

enum Command {
    Read(usize, usize, Reply<Payload>),
    Write(usize, Payload, Reply<()>),
    Digest(usize, usize, Reply<Digest>),
}

impl HostMemory {
    fn spawn(layout: KvLayout, blocks: u32, pool: Pool, checked: bool) -> Result<Arc<dyn KvMemory>, Error> {
        let (commands, received) = sync_channel(COMMANDS);
        let region = pool.region();
        let thread = thread::Builder::new().name("host-memory".to_owned());
        thread.spawn(move || serve(&pool, &received, checked)).map_err(Error::Thread)?;
        Ok(Arc::new(HostMemory { layout, blocks, region, commands }))
    }

    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Transfer<T> {
        let (reply, transfer) = kv::transfer();
        let _ = self.commands.send(command(reply));
        transfer
    }
}

impl KvMemory for HostMemory {
    fn layout(&self) -> KvLayout {
        self.layout
    }

    fn blocks(&self) -> u32 {
        self.blocks
    }

    fn read(&self, block: BlockId, rows: u32, _: StepId) -> Transfer<Payload> {
        let (at, bytes) = (block as usize * self.layout.block_bytes(), self.layout.payload_bytes(rows));
        self.ask(|reply| Command::Read(at, bytes, reply))
    }

    fn write(&self, block: BlockId, _: u32, payload: Payload, _: StepId) -> Transfer<()> {
        let at = block as usize * self.layout.block_bytes();
        self.ask(|reply| Command::Write(at, payload, reply))
    }

    fn region(&self) -> Option<Region> {
        Some(self.region.clone())
    }

    fn digest(&self, block: BlockId, rows: u32, _: StepId) -> Transfer<Digest> {
        let (at, bytes) = (block as usize * self.layout.block_bytes(), self.layout.payload_bytes(rows));
        self.ask(|reply| Command::Digest(at, bytes, reply))
    }
}

/// Whole blocks only, which lie as they travel. Until nobody can ask any more.
fn serve(pool: &Pool, commands: &Receiver<Command>, checked: bool) {
    for command in commands {
        match command {
            Command::Read(at, bytes, reply) => {
                let _ = reply.send(Ok(read(&pool.lock()[at..][..bytes], checked)));
            }
            Command::Write(at, payload, reply) => {
                let to = &mut pool.lock()[at..][..payload.bytes.len()];
                let _ = reply.send(write(to, &payload, checked));
            }
            Command::Digest(at, bytes, reply) => {
                let of = &pool.lock()[at..][..bytes];
                let _ = reply.send(Ok(if checked { Digest::of(of) } else { Digest(0) }));
            }
        }
    }
}

fn read(from: &[u8], checked: bool) -> Payload {
    if !checked {
        return Payload { bytes: from.to_vec().into(), digest: Digest(0) };
    }
    let (mut copy, mut bytes) = (HashedCopy::default(), Vec::with_capacity(from.len()));
    copy.append(from, &mut bytes);
    Payload { bytes: bytes.into(), digest: copy.digest() }
}

fn write(to: &mut [u8], payload: &Payload, checked: bool) -> Result<(), KvError> {
    if !checked {
        payload.bytes.reader().copy_to_slice(to);
        return Ok(());
    }
    let mut copy = HashedCopy::default();
    copy.copy(&mut payload.bytes.reader(), to);
    copy.digest().expect(payload.digest)
}

/// A file of that size which both processes can map, in memory if the system has such a place.
pub fn shared_directory() -> &'static Path {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory } else { Path::new("/tmp") }
}
