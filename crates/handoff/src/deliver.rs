//! Drives a [`Sender`] over one `Handoff.Deliver` call: reads blocks as they are computed, offers them with
//! their digests, sends again what was refused, commits, waits for the confirmation. At most a window of
//! bytes is read and unaccepted at any time. Knows neither engine nor router.

use crate::{
    Error, Now,
    digest::Binding,
    direct::Pool,
    framing,
    landing::landed,
    liveness::patience,
    sender::{self, Action, Bounds, Event, Failure},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use kv::{BlockId, Digest, KvError, KvMemory, Payload, StepId};
use proto::{deliver_message::Message, deliver_reply::Reply};
use std::{
    collections::{HashSet, VecDeque},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, Interval, MissedTickBehavior},
};
use tonic::{Streaming, metadata::MetadataMap, transport::Channel};

/// Messages between the driver and the transport; the bytes under way are bounded by the window.
const OUTGOING: usize = 4;
/// Most blocks under way, however small they are: bounds the replies that decode has to queue.
const MOST_BLOCKS: usize = 64;

/// The engine's pulse, for heartbeats.
pub type Pulse = Box<dyn Fn() -> proto::Heartbeat + Send + Sync>;

/// What to deliver, and to whom.
#[derive(Clone, Debug)]
pub struct Order {
    pub reservation: u64,
    pub epoch: u32,
    /// Of the decode worker, for errors.
    pub address: String,
    /// Who sends, for logs on the other side.
    pub member: String,
    pub weights_fingerprint: u64,
    /// One for each block of the sequence.
    pub bindings: Vec<Binding>,
    /// Leading blocks that decode has.
    pub present: u32,
    /// Others that it has, from an earlier epoch.
    pub accepted: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes read and not yet accepted; one block at least is always allowed.
    pub window_bytes: usize,
    /// Times that one block may be offered.
    pub tries: u32,
    /// Longest wait for a sign of life from decode.
    pub silence: Duration,
    pub heartbeat: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            window_bytes: 16 << 20,
            tries: 3,
            silence: Duration::from_secs(10),
            heartbeat: Duration::from_secs(1),
        }
    }
}

/// What went over the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Of payloads, those sent again included.
    pub bytes: u64,
    /// Distinct blocks.
    pub blocks: u32,
}

/// What [`Delivery::next`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Decode has this block: its holder may let go.
    Release(u32),
    /// Decode has confirmed everything.
    Done(Sent),
}

/// One delivery under way. Dropping it ends the call; decode then waits for the router's word.
pub struct Delivery {
    order: Order,
    pulse: Pulse,
    pool: Pool,
    sender: sender::Sender,
    /// Where each computed block lies, and the step that completes it.
    places: Vec<Option<(BlockId, StepId)>>,
    reads: FuturesUnordered<BoxFuture<'static, (u32, Result<Fetched, KvError>)>>,
    /// When the last read ended, or began while there was no other.
    copied: Instant,
    fetched: Option<Fetched>,
    commit: Option<proto::Commit>,
    queue: VecDeque<Message>,
    outgoing: mpsc::Sender<proto::DeliverMessage>,
    replies: Replies,
    clock: Interval,
    silence: Duration,
    start: Instant,
    sent: Sent,
    /// A block may be accepted twice.
    accepted: HashSet<u32>,
    /// The cause behind a failure that the state machine only knows as such.
    cause: Option<Error>,
    released: VecDeque<u32>,
    outcome: Option<Result<Sent, Error>>,
}

/// A block to offer: its digest, and its bytes or where they lie.
struct Fetched {
    digest: Digest,
    content: Content,
}

enum Content {
    Payload(Bytes),
    At(usize),
}

enum Replies {
    Opening(BoxFuture<'static, Result<Streaming<proto::DeliverReply>, tonic::Status>>),
    Open(Box<Streaming<proto::DeliverReply>>),
}

impl Delivery {
    /// Starts the call; nothing is awaited before [`Self::next`]. `trace` goes with the call.
    pub fn open(
        channel: Channel,
        order: Order,
        pool: impl Into<Pool>,
        pulse: Pulse,
        options: Options,
        trace: MetadataMap,
    ) -> Self {
        let pool = pool.into();
        let blocks = order.bindings.len() as u32;
        let has = |index| index < order.present || order.accepted.contains(&index);
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let mut clock = tokio::time::interval(options.heartbeat);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Delivery {
            sender: sender::Sender::new(blocks, has, bounds(&*pool.memory, options), Now::ZERO),
            places: vec![None; blocks as usize],
            reads: FuturesUnordered::new(),
            copied: Instant::now(),
            fetched: None,
            commit: None,
            queue: VecDeque::from([Message::Open(opening(&order, &pool))]),
            outgoing,
            replies: Replies::Opening(framing::deliver(channel, messages, trace).boxed()),
            clock,
            silence: options.silence,
            start: Instant::now(),
            sent: Sent::default(),
            accepted: HashSet::new(),
            cause: None,
            released: VecDeque::new(),
            outcome: None,
            order,
            pulse,
            pool,
        }
    }

    /// Block `index` of the sequence lies in `block` and is complete once step `after` has run.
    pub fn computed(&mut self, index: u32, block: BlockId, after: StepId) {
        if let Some(place) = self.places.get_mut(index as usize) {
            *place = Some((block, after));
            self.on(Event::Computed { index });
        }
    }

    pub fn first_token(&mut self, commit: proto::Commit) {
        let finished = commit.finished.is_some();
        self.commit.get_or_insert(commit);
        self.on(Event::FirstToken { finished });
    }

    /// Runs until there is progress to tell, or the delivery failed; nothing moves unless this is awaited.
    /// Cancel-safe: call it again.
    pub async fn next(&mut self) -> Result<Progress, Error> {
        loop {
            if let Some(index) = self.released.pop_front() {
                return Ok(Progress::Release(index));
            }
            if let Some(outcome) = self.outcome.take() {
                return outcome.map(Progress::Done);
            }
            tokio::select! {
                // What has come in counts before the time it took to get here.
                biased;
                Some((index, payload)) = self.reads.next() => self.read(index, payload),
                reply = self.replies.next() => self.reply(reply),
                () = push(&self.outgoing, &mut self.queue), if !self.queue.is_empty() => {}
                _ = self.clock.tick() => self.beat(),
            }
        }
    }

    fn on(&mut self, event: Event) {
        for action in self.sender.on(event, self.start.elapsed()) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Read { index } => self.begin_read(index),
            Action::Offer { index } => self.offer(index),
            Action::Release { index } => self.released.push_back(index),
            Action::Commit => self.queue.extend(self.commit.clone().map(Message::Commit)),
            Action::Complete => {
                let blocks = self.accepted.len() as u32;
                self.outcome = Some(Ok(Sent { blocks, ..self.sent }));
            }
            Action::Fail(failure) => self.outcome = Some(Err(self.explain(failure))),
        }
    }

    fn explain(&mut self, failure: Failure) -> Error {
        let cause = self.cause.take();
        match (failure, cause) {
            (Failure::Refused { index }, cause) => {
                Error::Refused { index, cause: cause.map_or_else(String::new, |cause| cause.to_string()) }
            }
            (Failure::Silent, _) => Error::Silent(self.silence),
            (Failure::Protocol, _) => Error::Protocol("it confirmed blocks that were not accepted".into()),
            (Failure::Broken, Some(cause)) => cause,
            (Failure::Broken, None) => Error::Protocol("the stream broke".into()),
        }
    }

    fn break_off(&mut self, cause: Error) {
        self.cause = Some(cause);
        self.on(Event::Broken);
    }

    fn begin_read(&mut self, index: u32) {
        let Some((block, after)) = self.places[index as usize] else {
            return;
        };
        if self.reads.is_empty() {
            self.copied = Instant::now();
        }
        let read = fetch(&self.pool, block, self.order.bindings[index as usize].rows, after);
        self.reads.push(async move { (index, read.await) }.boxed());
    }

    fn read(&mut self, index: u32, fetched: Result<Fetched, KvError>) {
        self.copied = Instant::now();
        match fetched {
            Ok(fetched) => {
                self.fetched = Some(fetched);
                self.on(Event::Fetched { index });
                self.fetched = None;
            }
            Err(error) => self.break_off(error.into()),
        }
    }

    fn offer(&mut self, index: u32) {
        let (Some(fetched), binding) = (self.fetched.take(), self.order.bindings[index as usize]) else {
            return;
        };
        let (rows, digest) = (binding.rows, binding.seal(fetched.digest));
        self.sent.bytes += self.pool.memory.layout().payload_bytes(rows) as u64;
        let (payload, address) = match fetched.content {
            Content::Payload(bytes) => (bytes, None),
            Content::At(address) => (Bytes::new(), Some(address as u64)),
        };
        self.queue.push_back(Message::Offer(proto::Offer { index, rows, digest, payload, address }));
    }

    fn beat(&mut self) {
        let pulse = (self.pulse)();
        let patience = patience(self.silence, Duration::from_millis(pulse.longest_step_ms.into()));
        if !self.reads.is_empty() && self.copied.elapsed() > patience {
            let why = format!("it has copied no block out for {patience:?}");
            return self.break_off(KvError::Stopped(why).into());
        }
        if self.queue.is_empty() {
            self.queue.push_back(Message::Heartbeat(pulse));
        }
        self.on(Event::Tick);
    }

    fn reply(&mut self, reply: Result<Option<Reply>, tonic::Status>) {
        match reply {
            Ok(Some(reply)) => self.said(reply),
            Ok(None) => self.break_off(self.lost("it ended the stream before confirming")),
            Err(status) => self.break_off(self.status(status)),
        }
    }

    fn said(&mut self, reply: Reply) {
        match reply {
            Reply::Accept(proto::Accept { index }) => {
                if (index as usize) < self.places.len() {
                    self.accepted.insert(index);
                }
                self.on(Event::Accepted { index });
            }
            Reply::Refuse(proto::Refuse { index, error }) => {
                let error = error.unwrap_or_default();
                tracing::warn!(index, %error, "decode refused a block");
                self.cause = Some(Error::Peer(error));
                self.on(Event::Refused { index });
            }
            Reply::Committed(_) => self.on(Event::Committed),
            Reply::Error(error) => self.break_off(Error::Peer(error)),
            Reply::Heartbeat(_) => self.on(Event::Heartbeat),
        }
    }

    fn lost(&self, cause: &str) -> Error {
        Error::Transport { address: self.order.address.clone(), cause: cause.to_owned() }
    }

    /// A status with Baton's code is decode's own word; any other means that it was not reached.
    fn status(&self, status: tonic::Status) -> Error {
        let error = proto::Error::from(status);
        if error.code() == proto::ErrorCode::WorkerLost {
            self.lost(&error.message)
        } else {
            Error::Peer(error)
        }
    }
}

impl Replies {
    async fn next(&mut self) -> Result<Option<Reply>, tonic::Status> {
        loop {
            match self {
                Replies::Opening(call) => *self = Replies::Open(Box::new(call.await?)),
                Replies::Open(stream) => match stream.message().await? {
                    // A reply of a kind this version does not know.
                    Some(proto::DeliverReply { reply: None }) => continue,
                    Some(proto::DeliverReply { reply }) => return Ok(reply),
                    None => return Ok(None),
                },
            }
        }
    }
}

/// Sends the oldest message once there is room. When the transport has dropped its end, the reason comes as
/// a reply.
async fn push(outgoing: &mpsc::Sender<proto::DeliverMessage>, queue: &mut VecDeque<Message>) {
    match outgoing.reserve().await {
        Ok(room) => room.send(proto::DeliverMessage { message: queue.pop_front() }),
        Err(_) => queue.clear(),
    }
}

fn bounds(memory: &dyn KvMemory, options: Options) -> Bounds {
    let window = (options.window_bytes / memory.layout().block_bytes().max(1)).clamp(1, MOST_BLOCKS);
    Bounds { window: window as u32, tries: options.tries.max(1), silence: options.silence }
}

fn opening(order: &Order, pool: &Pool) -> proto::DeliverOpen {
    proto::DeliverOpen {
        reservation: order.reservation,
        epoch: order.epoch,
        layout_fingerprint: pool.memory.layout().fingerprint(),
        weights_fingerprint: order.weights_fingerprint,
        member: order.member.clone(),
        origin: pool.origin(),
    }
}

/// Copies a block out, or makes sure that it is as it will be read.
fn fetch(
    pool: &Pool,
    block: BlockId,
    rows: u32,
    after: StepId,
) -> BoxFuture<'static, Result<Fetched, KvError>> {
    let Some((_, region)) = &pool.direct else {
        let transfer = pool.memory.read(block, rows, after);
        return async move {
            let Payload { bytes, digest } = landed(transfer).await?;
            Ok(Fetched { digest, content: Content::Payload(bytes.together()) })
        }
        .boxed();
    };
    let at = region.block(&pool.memory.layout(), block);
    let digest = pool.memory.digest(block, rows, after);
    async move { Ok(Fetched { digest: landed(digest).await?, content: Content::At(at) }) }.boxed()
}
