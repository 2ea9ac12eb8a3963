//! The loop around the core: obeys commands, keeps the executor busy, wakes when a listener is gone.
//! On its own OS thread ([`spawn`]) or as a task in whatever time the caller's runtime keeps ([`drive`]).

use crate::{
    EngineConfig, EngineHandle, Executor, ExecutorError, Offers, Refused, Reservation, Running,
    core::Core,
    handle::{Command, Shared},
};
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::{Notify, mpsc, watch};

/// Asks that may queue before an asker has to wait.
const COMMANDS: usize = 256;

/// Runs an engine on its own thread.
///
/// # Panics
/// If the configuration wants more blocks than the executor has, or no thread can be started.
pub fn spawn<E: Executor>(executor: E, config: EngineConfig) -> EngineHandle {
    let (handle, engine) = drive(executor, config);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.expect("a runtime without I/O can be built");
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || runtime.block_on(engine))
        .expect("the engine's thread can be started");
    handle
}

/// An engine as a future that the caller runs. It ends when all handles and sequences are gone, or
/// when the executor fails.
///
/// # Panics
/// If the configuration wants more blocks than the executor has.
pub fn drive<E: Executor>(
    executor: E,
    config: EngineConfig,
) -> (EngineHandle, impl Future<Output = ()> + Send) {
    let kv = executor.kv_memory();
    let core = Core::new(config.clone(), executor.limits(), kv.layout().block_tokens, kv.blocks());
    let (sender, commands) = mpsc::channel(COMMANDS);
    let (stop, stopped) = watch::channel(None);
    let shared = Arc::new(Shared {
        load: watch::Sender::new(core.load()),
        last_submitted: AtomicU64::new(0),
        stopped,
        kv,
        limits: core.limits(),
    });
    let driver = Driver {
        executor,
        core,
        config,
        commands,
        open: true,
        sender: sender.downgrade(),
        wake: Arc::new(Notify::new()),
        shared: Arc::clone(&shared),
        stop,
    };
    (EngineHandle::new(sender, shared), driver.run())
}

struct Driver<E> {
    executor: E,
    core: Core,
    config: EngineConfig,
    commands: mpsc::Receiver<Command>,
    /// A handle or a reservation exists.
    open: bool,
    sender: mpsc::WeakSender<Command>,
    /// A listener went, or an offer was delivered.
    wake: Arc<Notify>,
    shared: Arc<Shared>,
    stop: watch::Sender<Option<String>>,
}

impl<E: Executor> Driver<E> {
    async fn run(mut self) {
        let cause = match self.serve().await {
            Ok(()) => "nobody uses it any more".to_owned(),
            Err(ExecutorError(cause)) => cause,
        };
        // First the cause, so that whoever finds the engine gone finds it.
        self.stop.send_replace(Some(cause.clone()));
        self.core.fail(&cause);
        self.report();
    }

    async fn serve(&mut self) -> Result<(), ExecutorError> {
        while self.open || !self.core.is_empty() {
            self.submit()?;
            self.report();
            let wake = Arc::clone(&self.wake);
            tokio::select! {
                biased;
                () = wake.notified() => self.core.sweep(),
                command = self.commands.recv(), if self.open => self.obey_all(command),
                // With nothing in flight as well: a device that is lost meanwhile says so here.
                output = self.executor.collect() => {
                    let record = self.core.collect(output?)?;
                    if let Some(on_step) = &self.config.on_step {
                        on_step(record);
                    }
                }
            }
        }
        Ok(())
    }

    /// Keeps as many steps in flight as there is work for.
    fn submit(&mut self) -> Result<(), ExecutorError> {
        while self.core.in_flight() < E::IN_FLIGHT {
            let Some(step) = self.core.plan() else { break };
            let id = self.executor.submit(step)?;
            self.shared.last_submitted.store(id, Ordering::Release);
            self.core.submitted(id);
        }
        Ok(())
    }

    fn report(&self) {
        let load = self.core.load();
        self.shared.load.send_if_modified(|shown| std::mem::replace(shown, load) != load);
    }

    /// All asks that have queued up, so that they can share the next step.
    fn obey_all(&mut self, first: Option<Command>) {
        self.open = first.is_some();
        // What was let go before these were asked is free for them.
        self.core.sweep();
        let mut next = first;
        while let Some(command) = next {
            self.obey(command);
            next = self.commands.try_recv().ok();
        }
    }

    /// An asker that has gone drops the answer, and with it what was granted.
    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate { spec, reply } => {
                let offers = self.offers();
                let granted = self.core.generate(spec, offers.clone());
                drop(reply.send(granted.map(|accepted| Running::new(accepted.events, offers))));
            }
            Command::Prefill { spec, reply } => {
                let offers = self.offers();
                let granted = self.core.prefill(spec, offers.clone());
                drop(reply.send(granted.map(|accepted| Running::new(accepted.events, offers))));
            }
            Command::Reserve { spec, reply } => drop(reply.send(self.reserve(spec))),
            Command::Activate { id, first } => self.core.activate(id, first),
            Command::Quarantine { id, writing } => self.core.quarantine(id, &writing),
            Command::Check { reply } => drop(reply.send(self.core.check())),
        }
    }

    fn reserve(&mut self, spec: crate::SequenceSpec) -> Result<Reservation, Refused> {
        let offers = self.offers();
        let (accepted, blocks, present) = self.core.reserve(spec, offers.clone())?;
        let running = Running::new(accepted.events, offers);
        // Without any handle left nobody waits for the answer either.
        let commands =
            self.sender.upgrade().ok_or_else(|| Refused::Stopped("its handles are gone".to_owned()))?;
        Ok(Reservation::new(blocks, present, accepted.id, running, commands))
    }

    fn offers(&self) -> Offers {
        Offers::new(Arc::clone(&self.wake))
    }
}
