//! The device of a simulated worker: the real simulated executor, behind what a seed does to it. It can hang,
//! its blocks can be damaged on the way, and it can be [`Broken`], to prove that the simulation would notice.

use crate::nature::Chance;
use bytes::Bytes;
use engine::{
    Executor, ExecutorError, Limits, StepOutput,
    simulated::{SimExecutor, SimOptions},
};
use kernels::StepInput;
use kv::{BlockId, KvLayout, KvMemory, Payload, StepId, Transfer};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;

/// A fault that no worker may have, for proving that it would show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Damaged blocks are accepted.
    Digest,
    /// Blocks are accepted and not written.
    Lost,
    /// Blocks are written elsewhere.
    Misplaced,
    /// Blocks are accepted long before they are written, perhaps into what is somebody else's by then.
    Late,
    /// Sampling depends on the worker.
    Noise,
    /// Some writes never end, so that blocks stay held.
    Stuck,
}

impl Broken {
    pub const ALL: [(&str, Broken); 6] = [
        ("digest", Broken::Digest),
        ("lost", Broken::Lost),
        ("misplaced", Broken::Misplaced),
        ("late", Broken::Late),
        ("noise", Broken::Noise),
        ("stuck", Broken::Stuck),
    ];
}

/// What can be done to a device while it runs.
#[derive(Clone)]
pub struct Controls {
    pub hung: Arc<watch::Sender<bool>>,
    /// It breaks in its next step.
    pub failing: Arc<AtomicBool>,
    /// One in so many blocks is damaged on its way out; 0: none.
    pub damage: u64,
    pub broken: Option<Broken>,
    /// A number of this worker alone.
    pub own: u64,
}

pub struct Device {
    executor: SimExecutor,
    controls: Controls,
    hung: watch::Receiver<bool>,
    memory: Arc<Memory>,
}

impl Device {
    pub fn new(options: SimOptions, controls: Controls, chance: Chance) -> Self {
        let executor = SimExecutor::new(options);
        let memory =
            Memory { memory: executor.kv_memory(), controls: controls.clone(), chance: Mutex::new(chance) };
        Device { executor, hung: controls.hung.subscribe(), controls, memory: Arc::new(memory) }
    }
}

impl Executor for Device {
    fn submit(&mut self, mut step: StepInput) -> Result<StepId, ExecutorError> {
        if self.controls.broken == Some(Broken::Noise) {
            let own = self.controls.own;
            step.init.iter_mut().for_each(|init| Arc::make_mut(&mut init.sampling).seed ^= own);
        }
        self.executor.submit(step)
    }

    async fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        // The sender lives in the controls.
        let _ = self.hung.wait_for(|hung| !hung).await;
        if self.controls.failing.load(Ordering::Relaxed) {
            return Err(ExecutorError("the device failed".to_owned()));
        }
        self.executor.collect().await
    }

    fn kv_memory(&self) -> Arc<dyn KvMemory> {
        self.memory.clone()
    }

    fn limits(&self) -> Limits {
        self.executor.limits()
    }
}

struct Memory {
    memory: Arc<dyn KvMemory>,
    controls: Controls,
    chance: Mutex<Chance>,
}

impl Memory {
    /// What hangs copies nothing either, and all of it when it goes on.
    fn moving<T: Send + 'static>(
        &self,
        copy: impl FnOnce(&dyn KvMemory) -> Transfer<T> + Send + 'static,
    ) -> Transfer<T> {
        if !*self.controls.hung.borrow() {
            return copy(&*self.memory);
        }
        let (memory, mut hung) = (self.memory.clone(), self.controls.hung.subscribe());
        let (reply, copied) = kv::transfer();
        tokio::spawn(async move {
            let goes_on = hung.wait_for(|hung| !hung).await.is_ok();
            if goes_on && let Ok(result) = copy(&*memory).await {
                let _ = reply.send(result);
            }
        });
        copied
    }

    fn once_in(&self, n: u64) -> bool {
        n > 0 && self.chance.lock().unwrap_or_else(PoisonError::into_inner).once_in(n)
    }
}

impl KvMemory for Memory {
    fn layout(&self) -> KvLayout {
        self.memory.layout()
    }

    fn blocks(&self) -> u32 {
        self.memory.blocks()
    }

    fn read(&self, block: BlockId, rows: u32, after: StepId) -> Transfer<Payload> {
        let whole = self.moving(move |memory| memory.read(block, rows, after));
        if !self.once_in(self.controls.damage) {
            return whole;
        }
        then(whole, |payload| Payload { bytes: flipped(&payload.bytes.together()).into(), ..payload })
    }

    fn write(&self, block: BlockId, rows: u32, payload: Payload, after: StepId) -> Transfer<()> {
        match self.controls.broken {
            Some(Broken::Digest) if self.once_in(100) => {
                self.memory.write(block, rows, Payload::new(flipped(&payload.bytes.together())), after)
            }
            Some(Broken::Lost) if self.once_in(100) => done(),
            Some(Broken::Misplaced) if self.once_in(100) => {
                self.memory.write((block + 1) % self.blocks(), rows, payload, after)
            }
            Some(Broken::Late) => {
                let memory = self.memory.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    let _ = memory.write(block, rows, payload, after).await;
                });
                done()
            }
            Some(Broken::Stuck) if self.once_in(100) => {
                let (reply, never) = kv::transfer();
                std::mem::forget(reply);
                never
            }
            _ => self.moving(move |memory| memory.write(block, rows, payload, after)),
        }
    }
}

fn flipped(bytes: &Bytes) -> Bytes {
    let mut bytes = bytes.to_vec();
    bytes[0] ^= 1;
    bytes.into()
}

fn done() -> Transfer<()> {
    let (reply, transfer) = kv::transfer();
    let _ = reply.send(Ok(()));
    transfer
}

/// The same transfer with its content changed.
fn then<T: Send + 'static>(
    transfer: Transfer<T>,
    change: impl FnOnce(T) -> T + Send + 'static,
) -> Transfer<T> {
    let (reply, changed) = kv::transfer();
    tokio::spawn(async move {
        if let Ok(result) = transfer.await {
            let _ = reply.send(result.map(change));
        }
    });
    changed
}
