//! The services' side of the engine: ask, listen, let go. Dropping a [`Running`] or a
//! [`Reservation`] frees everything it holds, in whatever state it is, before the next step is planned.

use crate::{EngineLoad, Event, FirstToken, Limits, Refused, SequenceSpec, core::SequenceId};
use kv::{BlockId, Counts, KvMemory, StepId};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

/// Asks of the engine. Cheap to clone; the engine ends when all handles and sequences are gone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    /// Prefill and decode here. Events: `Started`, `PromptLogprob`s, `Token`s, `Finished`; or `Failed`.
    pub async fn generate(&self, spec: SequenceSpec) -> Result<Running, Refused> {
        self.ask(|reply| Command::Generate { spec, reply }).await
    }

    /// Up to the first token, for a hand-off. Events: `Started`, `Computed` block by block,
    /// `PromptLogprob`s, one `Token`, `Finished` if that token ends the sequence. Every computed block
    /// stays held until it is released or the `Running` is dropped.
    pub async fn prefill(&self, spec: SequenceSpec) -> Result<Running, Refused> {
        self.ask(|reply| Command::Prefill { spec, reply }).await
    }

    /// Room for a sequence whose blocks are computed elsewhere: pins what the prefix cache has,
    /// allocates the rest for `tokens` and one more. [`Refused::Full`] at once if there is no room.
    pub async fn reserve(&self, spec: SequenceSpec) -> Result<Reservation, Refused> {
        self.ask(|reply| Command::Reserve { spec, reply }).await
    }

    pub fn load(&self) -> watch::Receiver<EngineLoad> {
        self.shared.load.subscribe()
    }

    pub fn kv_memory(&self) -> Arc<dyn KvMemory> {
        Arc::clone(&self.shared.kv)
    }

    /// What one sequence may ask for: `max_context` is the model's or the pool's, whichever is less.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// The newest submitted step: a write ordered after it cannot be overwritten by an earlier use of its block.
    pub fn last_submitted(&self) -> StepId {
        self.shared.last_submitted.load(Ordering::Acquire)
    }

    /// Verifies the bookkeeping of all blocks; the counts, or the first violation.
    pub async fn check_pool(&self) -> Result<Counts, String> {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Check { reply }).await.is_err() {
            return Err(self.shared.cause());
        }
        answer.await.unwrap_or_else(|_| Err(self.shared.cause()))
    }

    /// Resolves with the cause when the engine has died.
    pub async fn stopped(&self) -> String {
        let mut stopped = self.shared.stopped.clone();
        // An error means that the engine has ended without naming a cause.
        let _ = stopped.wait_for(Option::is_some).await;
        self.shared.cause()
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refused> {
        let (reply, answer) = oneshot::channel();
        let refused = || Refused::Stopped(self.shared.cause());
        self.commands.send(command(reply)).await.map_err(|_| refused())?;
        answer.await.unwrap_or_else(|_| Err(refused()))
    }
}

/// A sequence in the engine. Dropping it cancels the sequence and frees everything.
pub struct Running {
    /// Closed after `Finished`, `Preempted` or `Failed`; but a prefill that has computed stays open while its
    /// blocks are on offer, and silent.
    pub events: mpsc::Receiver<Event>,
    offers: Offers,
    // Dropped after `events`, so that the engine looks when the receiver is gone.
    _wake: WakeOnDrop,
}

impl Running {
    pub(crate) fn new(events: mpsc::Receiver<Event>, offers: Offers) -> Self {
        let wake = WakeOnDrop(Arc::clone(&offers.wake));
        Running { events, offers, _wake: wake }
    }

    /// Prefill: block `index` of the sequence is delivered; let it go to the prefix cache.
    pub fn release(&self, index: u32) {
        self.offers.release(index);
    }

    /// The same for tasks that do not own the `Running`.
    pub fn offers(&self) -> Offers {
        self.offers.clone()
    }
}

/// Lets delivered blocks of one sequence go. Indices that are not on offer are ignored.
#[derive(Clone)]
pub struct Offers {
    /// Not yet seen by the engine; at most one entry per delivered block.
    released: Arc<Mutex<Vec<u32>>>,
    wake: Arc<Notify>,
}

impl Offers {
    pub(crate) fn new(wake: Arc<Notify>) -> Self {
        Offers { released: Arc::default(), wake }
    }

    pub fn release(&self, index: u32) {
        self.released.lock().unwrap_or_else(PoisonError::into_inner).push(index);
        self.wake.notify_one();
    }

    pub(crate) fn take_released(&self) -> Vec<u32> {
        std::mem::take(&mut self.released.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Room for a sequence. Dropping it frees the room.
pub struct Reservation {
    /// The sequence's blocks, in order: `present` that hold their content already, then those to be written.
    pub blocks: Vec<BlockId>,
    pub present: u32,
    id: SequenceId,
    running: Running,
    commands: mpsc::Sender<Command>,
}

impl Reservation {
    pub(crate) fn new(
        blocks: Vec<BlockId>,
        present: u32,
        id: SequenceId,
        running: Running,
        commands: mpsc::Sender<Command>,
    ) -> Self {
        Reservation { blocks, present, id, running, commands }
    }

    /// All blocks are written: decode after `first`, the token at position `tokens.len()`. Events: the
    /// `Token`s after it, `Finished`; or `Preempted`, or `Failed`.
    pub async fn activate(self, first: FirstToken) -> Running {
        // If the engine has stopped, `events` says so.
        let _ = self.commands.send(Command::Activate { id: self.id, first }).await;
        self.running
    }

    /// Ends, but something still writes into the blocks of these indices: nobody gets them until the answer is
    /// dropped. The other blocks are free at once.
    pub async fn quarantine(self, writing: Vec<u32>) -> Quarantine {
        let _ = self.commands.send(Command::Quarantine { id: self.id, writing }).await;
        Quarantine { _listener: self.running }
    }
}

/// Blocks that are nobody's. To be dropped when nothing writes into them any more.
pub struct Quarantine {
    _listener: Running,
}

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refused>>;

pub(crate) enum Command {
    Generate { spec: SequenceSpec, reply: Reply<Running> },
    Prefill { spec: SequenceSpec, reply: Reply<Running> },
    Reserve { spec: SequenceSpec, reply: Reply<Reservation> },
    Activate { id: SequenceId, first: FirstToken },
    Quarantine { id: SequenceId, writing: Vec<u32> },
    Check { reply: oneshot::Sender<Result<Counts, String>> },
}

/// What handles read without asking.
pub(crate) struct Shared {
    pub load: watch::Sender<EngineLoad>,
    pub last_submitted: AtomicU64,
    pub stopped: watch::Receiver<Option<String>>,
    pub kv: Arc<dyn KvMemory>,
    pub limits: Limits,
}

impl Shared {
    fn cause(&self) -> String {
        self.stopped.borrow().clone().unwrap_or_else(|| "its thread has ended".to_owned())
    }
}

impl EngineHandle {
    pub(crate) fn new(commands: mpsc::Sender<Command>, shared: Arc<Shared>) -> Self {
        EngineHandle { commands, shared }
    }
}

struct WakeOnDrop(Arc<Notify>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}
