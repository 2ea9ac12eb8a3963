//! Decode steps recorded as CUDA graphs, one per bucket of entries. The first step of a bucket runs as it is, which
//! brings all scratch memory to its size; the second is recorded; later ones are replayed.

use super::device::{Device, device};
use crate::Error;
use cudarc::driver::{CudaGraph, sys};
use std::collections::HashMap;

#[derive(Default)]
pub struct Graphs(HashMap<u32, State>);

enum State {
    Seen,
    Recorded(Recorded),
}

pub struct Recorded(CudaGraph);

// SAFETY: a graph is launched and destroyed by whoever owns the backend, one thread at a time.
unsafe impl Send for Recorded {}
unsafe impl Sync for Recorded {}

/// What to do with the next step of a bucket.
pub enum Next {
    Run,
    Record,
    Replayed,
}

impl Graphs {
    /// Replays the record of `bucket`, if there is one.
    pub fn next(&mut self, bucket: u32) -> Result<Next, Error> {
        match self.0.get(&bucket) {
            None => {
                self.0.insert(bucket, State::Seen);
                Ok(Next::Run)
            }
            Some(State::Seen) => Ok(Next::Record),
            Some(State::Recorded(graph)) => {
                graph.0.launch().map_err(device)?;
                Ok(Next::Replayed)
            }
        }
    }

    pub fn keep(&mut self, bucket: u32, graph: Recorded) -> Result<(), Error> {
        graph.0.launch().map_err(device)?;
        self.0.insert(bucket, State::Recorded(graph));
        Ok(())
    }

    /// Addresses have changed.
    pub fn forget(&mut self) {
        self.0.clear();
    }
}

pub fn begin(on: &Device) -> Result<(), Error> {
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    on.stream.begin_capture(mode).map_err(device)
}

pub fn end(on: &Device) -> Result<Recorded, Error> {
    // The enum has no name for "no flags"; uploading at once is what is wanted anyway.
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = on.stream.end_capture(flags).map_err(device)?;
    graph.map(Recorded).ok_or_else(|| Error::Device("a recorded step came out empty".to_string()))
}
