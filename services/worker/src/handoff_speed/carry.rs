//! The first process: it sends its memories to the second one by each way, and times it.

use super::{
    Way,
    memory::{Memories, Size},
    peer::{Ask, PIECE, RESERVATION, Said, WEIGHTS, cpu_seconds, names},
};
use crate::Error;
use handoff::{
    deliver::{Delivery, Options, Order, Progress},
    direct::Pool,
    transport,
};
use std::{
    io::{self, Read, Write},
    net::TcpStream,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};
use tonic::{metadata::MetadataMap, transport::Channel};

/// Longest wait for a word of the other process; it may load a backend meanwhile.
const ANSWER: Duration = Duration::from_secs(300);

/// One transfer of everything.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub seconds: f64,
    /// Of both processes.
    pub cpu_seconds: f64,
    /// From the last block computed to the end.
    pub tail_seconds: f64,
}

/// How fast the blocks come to be.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub chunks: u32,
    pub chunk: Duration,
}

/// All at once.
pub const AT_ONCE: Pace = Pace { chunks: 1, chunk: Duration::ZERO };

pub struct Carrier {
    stdin: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    /// Ended when this is dropped.
    _process: Child,
    channel: Channel,
    grpc: String,
    tcp: String,
    size: Option<Size>,
    memories: Option<Arc<Memories>>,
}

impl Carrier {
    /// `peer` runs [`super::peer`].
    pub async fn start(mut peer: Command) -> Result<Carrier, Error> {
        peer.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = peer.spawn().map_err(failed)?;
        let stdin = process.stdin.take().ok_or_else(|| failed("no stdin"))?;
        let stdout = process.stdout.take().ok_or_else(|| failed("no stdout"))?;
        let mut said = BufReader::new(stdout).lines();
        let Said::Listening { grpc, tcp } = hear(&mut said).await? else {
            return Err(failed("the other process did not say where it listens"));
        };
        let channel = transport::channel(&proto::Dial::default(), &grpc).map_err(failed)?;
        Ok(Carrier { stdin, said, _process: process, channel, grpc, tcp, size: None, memories: None })
    }

    /// Memories of this size in both processes; those before go.
    pub async fn prepare(&mut self, size: Size) -> Result<(), Error> {
        self.memories = None;
        self.ask(&Ask::Prepare(size.clone())).await?;
        self.memories = Some(Arc::new(tokio::task::block_in_place(|| Memories::new(&size))?));
        self.size = Some(size);
        hear(&mut self.said).await.map(drop)
    }

    /// Bytes of one transfer.
    pub fn bytes(&self, way: Way) -> Result<usize, Error> {
        let (size, memories) = self.prepared()?;
        let block = match way {
            Way::Copy | Way::Tcp => size.block_bytes,
            Way::Grpc(memory) | Way::Nixl(memory) => memories.get(memory)?.layout().block_bytes(),
        };
        Ok(block * size.blocks as usize)
    }

    pub async fn run(&mut self, way: Way, pace: Pace) -> Result<Run, Error> {
        self.ask(&Ask::Take(way)).await?;
        hear(&mut self.said).await?;
        let cpu = cpu_seconds();
        let (seconds, tail_seconds) = match way {
            Way::Copy => (0.0, 0.0),
            Way::Tcp => (tokio::task::block_in_place(|| self.send())?, 0.0),
            Way::Grpc(memory) => self.deliver(self.memories()?.get(memory)?.into(), memory, pace).await?,
            Way::Nixl(memory) => self.deliver(self.memories()?.nixl(memory)?, memory, pace).await?,
        };
        let own = cpu_seconds() - cpu;
        let Said::Done { seconds: theirs, cpu_seconds } = hear(&mut self.said).await? else {
            return Err(failed("the other process did not say that it is done"));
        };
        // A copy is the other process's own work.
        let seconds = if matches!(way, Way::Copy) { theirs } else { seconds };
        Ok(Run { seconds, cpu_seconds: own + cpu_seconds, tail_seconds })
    }

    fn prepared(&self) -> Result<(&Size, &Arc<Memories>), Error> {
        self.size.as_ref().zip(self.memories.as_ref()).ok_or_else(|| failed("nothing was prepared"))
    }

    fn memories(&self) -> Result<&Memories, Error> {
        Ok(self.prepared()?.1)
    }

    async fn ask(&mut self, ask: &Ask) -> Result<(), Error> {
        let line = serde_json::to_string(ask).map_err(failed)? + "\n";
        self.stdin.write_all(line.as_bytes()).await.map_err(failed)
    }

    /// Over one plain connection.
    fn send(&self) -> Result<f64, Error> {
        let (size, memories) = self.prepared()?;
        let mut stream = TcpStream::connect(&self.tcp).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        let began = Instant::now();
        pour(&mut stream, size, &memories.pool.lock()).map_err(failed)?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// As a prefill worker does. Seconds in all, and from the last block computed on.
    async fn deliver(&self, pool: Pool, memory: super::Memory, pace: Pace) -> Result<(f64, f64), Error> {
        let order = self.order(&*self.memories()?.get(memory)?);
        let blocks = order.bindings.len() as u32;
        let began = Instant::now();
        let pulse = Box::new(proto::Heartbeat::default);
        let options = Options { silence: ANSWER, ..Options::default() };
        let channel = self.channel.clone();
        let mut delivery = Delivery::open(channel, order, pool, pulse, options, MetadataMap::new());
        let computed = compute(&mut delivery, blocks, pace).await?;
        delivery.first_token(commit(blocks));
        while let Progress::Release(_) = delivery.next().await.map_err(failed)? {}
        Ok((began.elapsed().as_secs_f64(), computed.elapsed().as_secs_f64()))
    }

    fn order(&self, memory: &dyn kv::KvMemory) -> Order {
        Order {
            reservation: RESERVATION,
            epoch: 1,
            address: self.grpc.clone(),
            member: "bench-handoff".to_owned(),
            weights_fingerprint: WEIGHTS,
            bindings: names(memory),
            present: 0,
            accepted: Vec::new(),
        }
    }
}

/// Chunk after chunk, while the delivery goes on; when the last one was there.
async fn compute(delivery: &mut Delivery, blocks: u32, pace: Pace) -> Result<Instant, Error> {
    for chunk in 0..pace.chunks {
        let ready = computing(pace.chunk);
        tokio::pin!(ready);
        loop {
            tokio::select! {
                () = &mut ready => break,
                progress = delivery.next(), if chunk > 0 => progress.map(drop).map_err(failed)?,
            }
        }
        let of = |chunk: u32| blocks * chunk / pace.chunks;
        (of(chunk)..of(chunk + 1)).for_each(|index| delivery.computed(index, index, 0));
    }
    Ok(Instant::now())
}

/// Even a sleep of no length waits for the timer's next millisecond.
async fn computing(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

fn commit(blocks: u32) -> proto::Commit {
    let position = blocks * super::memory::BLOCK_TOKENS;
    let first_token = Some(proto::Token { position, ..Default::default() });
    proto::Commit { first_token, ..Default::default() }
}

fn pour(stream: &mut TcpStream, size: &Size, pool: &[u8]) -> io::Result<()> {
    for block in pool.chunks_exact(size.block_bytes) {
        block.chunks(PIECE).try_for_each(|piece| stream.write_all(piece))?;
    }
    stream.read_exact(&mut [0])
}

async fn hear(said: &mut Lines<BufReader<ChildStdout>>) -> Result<Said, Error> {
    loop {
        let line = tokio::time::timeout(ANSWER, said.next_line()).await.map_err(failed)?.map_err(failed)?;
        let line = line.ok_or_else(|| failed("the other process ended; what it logged says why"))?;
        match serde_json::from_str(&line) {
            Ok(Said::Failed(why)) => return Err(failed(format!("the other process: {why}"))),
            Ok(said) => return Ok(said),
            // A library's own words: UCX writes its warnings to stdout.
            Err(_) => eprintln!("{line}"),
        }
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Measure(error.to_string())
}
