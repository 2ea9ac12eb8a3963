//! The outgoing side of one streaming call: events with bounded patience, heartbeats, and knowing when to
//! stop because the caller has left or this worker has to.

use crate::shared::Shared;
use proto::{Error, Heartbeat};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::mpsc,
    time::{Interval, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Events that may wait for the transport.
const EVENTS: usize = 64;

/// Why a call ends before its success.
pub enum Stop {
    /// Nobody listens.
    Gone,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

/// What to say of a call that ended like this, if it failed.
pub fn stopped_by(outcome: &Result<(), Stop>) -> Option<String> {
    match outcome {
        Err(Stop::Failed(error)) => Some(error.message.clone()),
        Ok(()) | Err(Stop::Gone) => None,
    }
}

/// An event stream that can carry heartbeats and errors.
pub trait Stream: Send + 'static {
    fn heartbeat(heartbeat: Heartbeat) -> Self;
    fn error(error: Error) -> Self;
}

pub struct Call<E> {
    pub shared: Arc<Shared>,
    /// All is computed and on offer: a worker that leaves still delivers it.
    pub delivers: bool,
    events: mpsc::Sender<Result<E, Status>>,
    pulse: Interval,
}

impl<E: Stream> Call<E> {
    pub fn open(shared: Arc<Shared>) -> (Self, ReceiverStream<Result<E, Status>>) {
        let (events, stream) = mpsc::channel(EVENTS);
        let mut pulse = tokio::time::interval(shared.heartbeat_every());
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        (Call { shared, delivers: false, events, pulse }, ReceiverStream::new(stream))
    }

    /// Waits for room, as long as a router may stall.
    pub async fn emit(&self, event: E) -> Result<(), Stop> {
        let patience = Duration::from_millis(self.shared.config.liveness.stalled_ms);
        match tokio::time::timeout(patience, self.events.send(Ok(event))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Stop::Gone),
            Err(_) => {
                tracing::warn!(?patience, "the router takes no events; giving the call up");
                Err(Stop::Gone)
            }
        }
    }

    /// Sends heartbeats until the call has to stop. Cancel-safe.
    pub async fn stopped(&mut self) -> Stop {
        loop {
            tokio::select! {
                () = self.events.closed() => return Stop::Gone,
                error = self.shared.ended(self.delivers) => return Stop::Failed(error),
                // A full queue proves life to whoever reads it.
                _ = self.pulse.tick() => drop(self.events.try_send(Ok(E::heartbeat(self.shared.heartbeat())))),
            }
        }
    }

    /// The last word of a call that did not succeed.
    pub async fn end(self, outcome: Result<(), Stop>) {
        match outcome {
            Ok(()) => {}
            Err(Stop::Gone) => tracing::debug!("the caller left"),
            Err(Stop::Failed(error)) => {
                tracing::info!(code = ?error.code(), %error, "the call failed");
                let _ = self.emit(E::error(error)).await;
            }
        }
    }
}
