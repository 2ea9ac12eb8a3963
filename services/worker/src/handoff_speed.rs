//! The hand-off measured between two processes of this machine, without model or cluster: the real driver and transport, from
//! memory to memory, beside what the machine itself can do in the same minute (a plain copy, a plain connection, the link to
//! the GPU). Ways are measured in turn and compared in pairs, so that what else runs here disturbs them alike.

mod carry;
mod figures;
mod memory;
mod peer;

pub use figures::{Figures, Link, Overlap, Requests, SizeFigures, WayFigures};
pub use memory::Memory;
pub use peer::run as peer;

use crate::{Error, buffers, load};
use carry::{AT_ONCE, Carrier, Pace, Run};
use figures::median;
use kernels::cuda::LinkRates;
use memmap2::MmapMut;
use memory::{BLOCK_TOKENS, Size};
use serde::{Deserialize, Serialize};
use std::{fmt, fs::File, io, path::PathBuf, time::Duration};
use tokio::process::Command;

/// Prompt tokens of the request whose protocol is timed.
const REQUEST_TOKENS: u32 = 128;
/// Bytes of its blocks: none to speak of.
const REQUEST_BLOCK: usize = 256;
const REQUESTS: usize = 300;
/// Chunks of the prompt whose transfer overlaps its prefill.
const CHUNKS: u32 = 16;
/// Time that a chunk takes to compute, in times that it takes to send.
const COMPUTE: f64 = 2.0;

#[derive(Clone, Debug)]
pub struct Options {
    /// One of [`crate::BACKENDS`].
    pub backend: String,
    /// Sizes of a block.
    pub block_bytes: Vec<usize>,
    /// Of one transfer.
    pub bytes: usize,
    /// Transfers by each way.
    pub rounds: usize,
    /// Measure NIXL as well.
    pub nixl: bool,
}

/// How bytes come from one process to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Way {
    /// The receiver copies out of memory that both have.
    Copy,
    /// A connection and nothing else.
    Tcp,
    Grpc(Memory),
    /// The receiver reads through NIXL.
    Nixl(Memory),
}

impl Way {
    fn direct(self) -> bool {
        matches!(self, Way::Nixl(_))
    }
}

const WAYS: [Way; 8] = [
    Way::Copy,
    Way::Tcp,
    Way::Grpc(Memory::HostUnchecked),
    Way::Grpc(Memory::Host),
    Way::Grpc(Memory::Backend),
    Way::Nixl(Memory::HostUnchecked),
    Way::Nixl(Memory::Host),
    Way::Nixl(Memory::Backend),
];

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::Copy => "copy through shared memory",
            Way::Tcp => "raw TCP",
            Way::Grpc(Memory::HostUnchecked) => "gRPC, host memory, no digests",
            Way::Grpc(Memory::Host) => "gRPC, host memory",
            Way::Grpc(Memory::Backend) => "gRPC, KV pool of the backend",
            Way::Nixl(Memory::HostUnchecked) => "NIXL, host memory, no digests",
            Way::Nixl(Memory::Host) => "NIXL, host memory",
            Way::Nixl(Memory::Backend) => "NIXL, KV pool of the backend",
        })
    }
}

/// Measures everything. `peer` starts this program so that it runs [`peer`].
pub async fn run(options: &Options, peer: Command) -> Result<Figures, Error> {
    buffers::keep();
    let link = load::link(&options.backend, options.block_bytes.iter().copied().max().unwrap_or(1))?;
    let shared = Shared::create(options.bytes + options.block_bytes.iter().max().unwrap_or(&0))?;
    let mut carrier = Carrier::start(peer).await?;
    let mut sizes = Vec::new();
    for block_bytes in &options.block_bytes {
        sizes.push(measure_size(&mut carrier, options, *block_bytes, &shared.0, link).await?);
    }
    let overlap = measure_overlap(&mut carrier, options).await?;
    let requests = measure_requests(&mut carrier).await?;
    Ok(Figures { link: link.map(Into::into), sizes, overlap, requests })
}

async fn measure_size(
    carrier: &mut Carrier,
    options: &Options,
    block_bytes: usize,
    shared: &std::path::Path,
    link: Option<LinkRates>,
) -> Result<SizeFigures, Error> {
    let blocks = blocks(options.bytes, block_bytes);
    let (backend, shared) = (Some(options.backend.clone()), Some(shared.to_path_buf()));
    carrier.prepare(Size { block_bytes, blocks, backend, shared }).await?;
    let ways: Vec<Way> = WAYS.into_iter().filter(|way| options.nixl || !way.direct()).collect();
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); ways.len()];
    // The first round warms up.
    for round in 0..=options.rounds {
        for (way, runs) in ways.iter().zip(&mut runs) {
            let run = carrier.run(*way, AT_ONCE).await?;
            tracing::debug!(%way, round, ?run);
            if round > 0 {
                runs.push(run);
            }
        }
    }
    let bytes = ways.iter().map(|way| carrier.bytes(*way)).collect::<Result<Vec<_>, _>>()?;
    let ways = figures::compare(&ways, &bytes, &runs, link);
    Ok(SizeFigures { block_bytes, blocks, rounds: options.rounds, ways })
}

fn blocks(bytes: usize, block_bytes: usize) -> u32 {
    (bytes / block_bytes).max(1) as u32
}

/// A prompt in chunks, each computed while those before are sent: what is left to send when the last one is computed.
async fn measure_overlap(carrier: &mut Carrier, options: &Options) -> Result<Overlap, Error> {
    let block_bytes = options.block_bytes.iter().copied().max().unwrap_or(1);
    let blocks = blocks(options.bytes, block_bytes).next_multiple_of(CHUNKS);
    carrier.prepare(Size { block_bytes, blocks, backend: None, shared: None }).await?;
    let way = Way::Grpc(Memory::Host);
    let (mut whole, mut tails) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        whole.push(carrier.run(way, AT_ONCE).await?.seconds);
        let chunk = median(&whole) / f64::from(CHUNKS);
        let pace = Pace { chunks: CHUNKS, chunk: Duration::from_secs_f64(COMPUTE * chunk) };
        tails.push(carrier.run(way, pace).await?.tail_seconds);
    }
    let chunk_milliseconds = 1e3 * median(&whole) / f64::from(CHUNKS);
    let tail_milliseconds = 1e3 * median(&tails);
    Ok(Overlap {
        chunks: CHUNKS,
        chunk_bytes: block_bytes * (blocks / CHUNKS) as usize,
        chunk_milliseconds,
        tail_milliseconds,
        tail_in_chunks: tail_milliseconds / chunk_milliseconds,
    })
}

/// Open, offer, accept, commit, confirm for a short prompt, one request after the other.
async fn measure_requests(carrier: &mut Carrier) -> Result<Requests, Error> {
    let blocks = REQUEST_TOKENS / BLOCK_TOKENS;
    carrier.prepare(Size { block_bytes: REQUEST_BLOCK, blocks, backend: None, shared: None }).await?;
    let mut runs = Vec::new();
    for _ in 0..REQUESTS {
        runs.push(carrier.run(Way::Grpc(Memory::Host), AT_ONCE).await?);
    }
    let of = |what: fn(&Run) -> f64| runs.iter().map(|run| 1e3 * what(run)).collect::<Vec<_>>();
    let milliseconds = of(|run| run.seconds);
    Ok(Requests {
        requests: REQUESTS,
        prompt_tokens: REQUEST_TOKENS,
        milliseconds: median(&milliseconds),
        milliseconds_p90: figures::quantile(&milliseconds, 0.9),
        cpu_milliseconds: median(&of(|run| run.cpu_seconds)),
    })
}

/// A file with something in it, removed at the end.
struct Shared(PathBuf);

impl Shared {
    fn create(bytes: usize) -> Result<Shared, Error> {
        let path = memory::shared_directory().join(format!("baton-bench-handoff-{}", std::process::id()));
        let failed =
            |error| Error::Measure(format!("cannot write {bytes} bytes to {}: {error}", path.display()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).map_err(failed)?;
        let shared = Shared(path.clone());
        Shared::fill(&file, bytes).map_err(failed)?;
        Ok(shared)
    }

    /// Through a mapping, so that it lies in pages of the size that the pools have.
    fn fill(file: &File, bytes: usize) -> io::Result<()> {
        // Room for all of it, for to write to a mapping without room ends the process.
        rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64)?;
        // SAFETY: nobody else has the file yet.
        let mut map = unsafe { MmapMut::map_mut(file) }?;
        kernels::cpu::large_pages(&map);
        memory::fill(&mut map);
        Ok(())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
