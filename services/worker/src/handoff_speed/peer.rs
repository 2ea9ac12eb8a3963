//! The second process: it takes what the first one sends, by each way, into memories of its own. The two speak in lines of
//! JSON over its stdin and stdout; it ends when its stdin does.

use super::{
    Way,
    memory::{BLOCK_TOKENS, Memories, Size},
};
use crate::{Error, buffers};
use handoff::{
    Patience,
    digest::{Binding, bindings},
    direct::Pool,
    receive::{Inbox, Incoming, Outcome, Plan},
    serve::{HandoffServer, Reservations},
    transport,
};
use kv::KvMemory;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::io::{AsyncBufReadExt, BufReader};

pub const RESERVATION: u64 = 1;
pub const WEIGHTS: u64 = 1;
const PATIENCE: Duration = Duration::from_secs(60);
/// What one read or write of a plain connection moves at most.
pub const PIECE: usize = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Make memories of this size; those before go.
    Prepare(Size),
    Take(Way),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Said {
    Listening { grpc: String, tcp: String },
    Ready,
    Done { seconds: f64, cpu_seconds: f64 },
    Failed(String),
}

/// What both sides call the blocks of a delivery: block `index` lies in pool block `index`.
pub fn names(memory: &dyn KvMemory) -> Vec<Binding> {
    let tokens: Vec<u32> = (0..memory.blocks() * BLOCK_TOKENS).collect();
    bindings(&tokens, BLOCK_TOKENS, memory.layout().fingerprint())
}

/// Seconds of all of this process's threads, in the system as well.
pub fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Serves the first process until it ends.
pub async fn run() -> Result<(), Error> {
    buffers::keep();
    let mut peer = Peer::listen().await?;
    let mut asks = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = asks.next_line().await.map_err(failed)? {
        let ask = serde_json::from_str(&line).map_err(failed)?;
        let answer = peer.answer(ask).await.unwrap_or_else(|error| Said::Failed(error.to_string()));
        say(&answer)?;
    }
    Ok(())
}

fn say(said: &Said) -> Result<(), Error> {
    let line = serde_json::to_string(said).map_err(failed)?;
    writeln!(io::stdout().lock(), "{line}").map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Measure(error.to_string())
}

struct Peer {
    table: Table,
    tcp: TcpListener,
    memories: Option<(Size, Arc<Memories>)>,
}

impl Peer {
    async fn listen() -> Result<Peer, Error> {
        let table = Table::default();
        let grpc = tokio::net::TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
        let tcp = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        let address = |at: io::Result<std::net::SocketAddr>| Ok::<_, Error>(at.map_err(failed)?.to_string());
        say(&Said::Listening {
            grpc: format!("http://{}", address(grpc.local_addr())?),
            tcp: address(tcp.local_addr())?,
        })?;
        let server = transport::server().add_service(HandoffServer::new(Arc::new(table.clone())));
        tokio::spawn(server.serve_with_incoming(transport::incoming(grpc)));
        Ok(Peer { table, tcp, memories: None })
    }

    async fn answer(&mut self, ask: Ask) -> Result<Said, Error> {
        match ask {
            Ask::Prepare(size) => {
                self.memories = None;
                let memories = tokio::task::block_in_place(|| Memories::new(&size))?;
                self.memories = Some((size, Arc::new(memories)));
                Ok(Said::Ready)
            }
            Ask::Take(way) => self.take(way).await,
        }
    }

    /// Says that it is ready, then takes everything.
    async fn take(&mut self, way: Way) -> Result<Said, Error> {
        let (size, memories) = self.memories.as_ref().ok_or_else(|| failed("nothing was prepared"))?;
        let cpu = cpu_seconds();
        let seconds = match way {
            Way::Copy => tokio::task::block_in_place(|| copy(size, memories))?,
            Way::Tcp => tokio::task::block_in_place(|| receive(&self.tcp, size, memories))?,
            Way::Grpc(memory) => {
                self.table.deliver(memories.get(memory)?.into(), &*memories.get(memory)?).await?
            }
            Way::Nixl(memory) => self.table.deliver(memories.nixl(memory)?, &*memories.get(memory)?).await?,
        };
        Ok(Said::Done { seconds, cpu_seconds: cpu_seconds() - cpu })
    }
}

/// Out of the other process's memory, block by block.
fn copy(size: &Size, memories: &Memories) -> Result<f64, Error> {
    let path = size.shared.as_ref().ok_or_else(|| failed("no file is shared"))?;
    // SAFETY: the first process keeps the file as it is while this one copies.
    let from = unsafe { memmap2::MmapMut::map_mut(&shared(path).map_err(failed)?) }.map_err(failed)?;
    kernels::cpu::large_pages(&from);
    let mut to = memories.pool.lock();
    // Maps the pages, which is not what is measured.
    std::hint::black_box(from.iter().step_by(4096).fold(0u8, |sum, byte| sum ^ byte));
    say(&Said::Ready)?;
    let began = Instant::now();
    let blocks = to.chunks_exact_mut(size.block_bytes).zip(from.chunks_exact(size.block_bytes));
    blocks.for_each(|(to, from)| to.copy_from_slice(from));
    Ok(began.elapsed().as_secs_f64())
}

fn shared(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// One connection, block by block into the pool; a byte back when all are here.
fn receive(listener: &TcpListener, size: &Size, memories: &Memories) -> Result<f64, Error> {
    say(&Said::Ready)?;
    let (mut stream, _) = listener.accept().map_err(failed)?;
    let began = Instant::now();
    fill(&mut stream, size, &mut memories.pool.lock()).map_err(failed)?;
    Ok(began.elapsed().as_secs_f64())
}

fn fill(stream: &mut TcpStream, size: &Size, pool: &mut [u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    for block in pool.chunks_exact_mut(size.block_bytes) {
        block.chunks_mut(PIECE).try_for_each(|piece| stream.read_exact(piece))?;
    }
    stream.write_all(&[1])
}

/// The one reservation there is.
#[derive(Clone, Default)]
struct Table(Arc<Mutex<Option<Inbox>>>);

impl Table {
    async fn deliver(&self, pool: Pool, memory: &dyn KvMemory) -> Result<f64, Error> {
        let plan = Plan {
            blocks: (0..memory.blocks()).collect(),
            bindings: names(memory),
            present: 0,
            weights_fingerprint: WEIGHTS,
            patience: Patience { silence: PATIENCE, delivery: PATIENCE, landing: PATIENCE },
        };
        let (mut incoming, inbox) = Incoming::new(plan, pool, || 0);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(inbox);
        say(&Said::Ready)?;
        let outcome = incoming.run().await;
        let seconds = incoming.received().elapsed.as_secs_f64();
        // What a failed delivery leaves under way ends with the process.
        drop(incoming.close());
        match outcome {
            Outcome::Complete(_) => Ok(seconds),
            other => Err(failed(format!("the delivery ended as {other:?}"))),
        }
    }
}

impl Reservations for Table {
    fn inbox(&self, _: u64) -> Option<Inbox> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn heartbeat(&self) -> proto::Heartbeat {
        proto::Heartbeat::default()
    }

    fn heartbeat_every(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn silence(&self) -> Duration {
        PATIENCE
    }
}
