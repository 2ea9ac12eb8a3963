//! Drives a [`Receiver`]: one [`Incoming`] for each reservation, owned by the task that serves the router's
//! call, fed by the delivery streams through a bounded [`Inbox`]. Checks epoch, fingerprints and rows
//! before a byte is written, and writes only through `landing.rs`, which compares the digest of what has landed. Knows neither engine nor sockets.

use crate::{
    digest::Binding,
    direct::Pool,
    landing::{self, Landing, Place, Reading},
    receiver::{Action, Answer, Event, Patience, Receiver, Reply, State},
    replies::Replies,
};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use kv::{BlockId, KvError, Pieces, StepId};
use proto::{ErrorCode, deliver_reply::Reply as Wire};
use std::{collections::HashMap, future::pending, time::Duration};
use tokio::{sync::mpsc, time::Instant};

/// Messages that may wait for one reservation; each carries at most one block.
const INBOX: usize = 4;
/// Writes in flight beyond which no more messages are taken in.
const MOST_WRITES: usize = 64;

/// Index and bytes of a block, and how its copy ended.
type Write = BoxFuture<'static, (u32, u64, Result<(), KvError>)>;

/// Where a delivery stream puts what it hears. Cheap to clone; closed when the reservation has ended.
#[derive(Clone)]
pub struct Inbox(mpsc::Sender<Parcel>);

pub(crate) struct Parcel {
    pub epoch: u32,
    pub content: Content,
    pub replies: Replies,
}

pub(crate) enum Content {
    Open(proto::DeliverOpen),
    /// The payload is not in the message.
    Offer(proto::Offer, Pieces),
    Commit(proto::Commit),
    Heartbeat,
    /// The stream has ended.
    Closed,
}

/// What a reservation waits for.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where each block of the sequence goes; blocks after those of `bindings` are for what decode adds.
    pub blocks: Vec<BlockId>,
    /// One for each block that the sequence fills.
    pub bindings: Vec<Binding>,
    /// Leading blocks that are here already.
    pub present: u32,
    pub weights_fingerprint: u64,
    pub patience: Patience,
}

/// How a reservation ends being one.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Everything is here: decode.
    Complete(proto::Commit),
    /// The first token ended the sequence.
    Finished(proto::Commit),
    /// Nobody delivered within the patience of the plan.
    Expired,
    /// This worker's own device has not copied a block in time. Both sides live, so nothing else would end the wait.
    Stalled,
    /// A block was not read from the other side in time, or it is not known whether the read still writes.
    Severed,
}

/// What has come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Of accepted payloads.
    pub bytes: u64,
    pub blocks: u32,
    /// Offers whose bytes were not those that their digest names.
    pub refused: u32,
    /// Writes that had not landed within the patience of the plan.
    pub overdue: u32,
    /// Writes whose end will never be known.
    pub lost: u32,
    /// From the first offer to the end.
    pub elapsed: Duration,
}

/// One reservation that is being filled.
pub struct Incoming {
    plan: Plan,
    receiver: Receiver,
    pool: Pool,
    after: Box<dyn Fn() -> StepId + Send + Sync>,
    inbox: mpsc::Receiver<Parcel>,
    /// The delivery stream of the current epoch.
    stream: Option<(u32, Replies)>,
    /// Where its offers lie.
    origin: Option<proto::Origin>,
    /// Where blocks that are being written are read from.
    reading: HashMap<u32, (proto::Origin, Reading)>,
    writes: FuturesUnordered<Write>,
    commit: Option<proto::Commit>,
    /// Why the block last spoiled did.
    fault: Option<proto::Error>,
    start: Instant,
    first_offer: Option<Instant>,
    received: Received,
    answer: Option<Answer>,
    outcome: Option<Outcome>,
}

/// The message under work: who sent it and the bytes it brought.
struct Heard<'a> {
    from: Option<(u32, &'a Replies)>,
    offer: Option<(proto::Offer, Pieces)>,
}

const NOBODY: Heard<'static> = Heard { from: None, offer: None };

impl Incoming {
    /// `after` names the step after which writes may begin: the last one submitted, which may still use
    /// what the blocks held before.
    pub fn new(
        plan: Plan,
        pool: impl Into<Pool>,
        after: impl Fn() -> StepId + Send + Sync + 'static,
    ) -> (Self, Inbox) {
        let (sender, inbox) = mpsc::channel(INBOX);
        let receiver = Receiver::new(plan.bindings.len() as u32, plan.present, plan.patience, Duration::ZERO);
        let incoming = Incoming {
            plan,
            receiver,
            pool: pool.into(),
            after: Box::new(after),
            inbox,
            stream: None,
            origin: None,
            reading: HashMap::new(),
            writes: FuturesUnordered::new(),
            commit: None,
            fault: None,
            start: Instant::now(),
            first_offer: None,
            received: Received::default(),
            answer: None,
            outcome: None,
        };
        (incoming, Inbox(sender))
    }

    pub fn epoch(&self) -> u32 {
        self.receiver.epoch()
    }

    pub fn received(&self) -> Received {
        let elapsed = self.first_offer.map_or(Duration::ZERO, |first| first.elapsed());
        Received { elapsed, ..self.received }
    }

    /// Runs until the reservation ends. Cancel-safe: call it again. The blocks may be used or freed once
    /// [`Self::close`] has returned as well.
    pub async fn run(&mut self) -> Outcome {
        loop {
            if let Some(outcome) = self.outcome.take() {
                return outcome;
            }
            let due = due(self.start, &self.receiver);
            tokio::select! {
                // What has come in counts before the time it took to get here.
                biased;
                Some((index, bytes, result)) = self.writes.next() => self.written(index, bytes, result),
                Some(parcel) = self.inbox.recv(), if self.writes.len() < MOST_WRITES => self.take(parcel),
                () = due => self.on(Event::Tick, NOBODY),
            }
        }
    }

    /// Gives up `epoch` for the next; see [`Answer`].
    pub fn advance(&mut self, epoch: u32) -> Answer {
        let before = self.receiver.epoch();
        self.on(Event::Advance { epoch }, NOBODY);
        if self.receiver.epoch() != before {
            self.commit = None;
        }
        self.answer.take().unwrap_or(Answer::AlreadyComplete)
    }

    /// Ends the reservation, whatever its state. `None`: nothing writes into its blocks any more.
    pub fn close(mut self) -> Option<Unsettled> {
        self.on(Event::Cancel, NOBODY);
        self.inbox.close();
        (self.receiver.state() == State::Quarantined).then_some(Unsettled(self))
    }

    fn on(&mut self, event: Event, mut heard: Heard<'_>) {
        for action in self.receiver.on(event, self.start.elapsed()) {
            self.act(action, &mut heard);
        }
    }

    fn act(&mut self, action: Action, heard: &mut Heard<'_>) {
        match action {
            Action::Write { index } => self.write(index, heard),
            Action::Reply { epoch, reply } => self.reply(epoch, reply, heard.from),
            Action::Tell(answer) => self.answer = Some(answer),
            Action::Activate => self.outcome = self.commit.clone().map(Outcome::Complete),
            Action::Finish => self.outcome = self.commit.clone().map(Outcome::Finished),
            Action::Expire => self.outcome = Some(Outcome::Expired),
            Action::Sever { index } => self.sever(index),
            // The owner does both, by what `close` and `Unsettled::settle` give.
            Action::Quarantine | Action::Free => {}
        }
    }

    /// The current epoch is heard from one stream only, the last that opened it with a matching identity.
    fn take(&mut self, Parcel { epoch, content, replies }: Parcel) {
        let current = epoch == self.receiver.epoch();
        let admitted = |(_, stream): &(u32, Replies)| stream.are_of(&replies);
        if let Content::Open(open) = content {
            self.open(epoch, open, replies);
        } else if !current || self.stream.as_ref().is_some_and(admitted) {
            self.hear(epoch, content, &replies);
        }
    }

    fn open(&mut self, epoch: u32, open: proto::DeliverOpen, replies: Replies) {
        if let Some(error) = self.mismatch(&open) {
            return replies.say(Wire::Error(error));
        }
        if epoch == self.receiver.epoch() {
            self.origin = open.origin;
        }
        if epoch == self.receiver.epoch()
            && let Some((_, former)) = self.stream.replace((epoch, replies.clone()))
        {
            let why = "another delivery of the same epoch took over";
            former.say(Wire::Error(proto::Error::new(ErrorCode::StaleEpoch, why)));
        }
        self.on(Event::Open { epoch }, Heard { from: Some((epoch, &replies)), offer: None });
    }

    fn hear(&mut self, epoch: u32, content: Content, replies: &Replies) {
        let from = Some((epoch, replies));
        match content {
            Content::Offer(offer, payload) => {
                self.first_offer.get_or_insert_with(Instant::now);
                let event = Event::Offer { epoch, index: offer.index };
                self.on(event, Heard { from, offer: Some((offer, payload)) });
            }
            Content::Commit(commit) => self.commit(epoch, commit, replies),
            Content::Open(_) | Content::Heartbeat => {
                self.on(Event::Heartbeat { epoch }, Heard { from, offer: None });
            }
            Content::Closed => self.closed(epoch, replies),
        }
    }

    fn commit(&mut self, epoch: u32, commit: proto::Commit, replies: &Replies) {
        let expected = self.plan.bindings.iter().map(|binding| binding.rows).sum::<u32>();
        let found = commit.first_token.as_ref().map(|token| token.position);
        if found != Some(expected) {
            let message = format!("the first token has position {found:?}, the sequence ends at {expected}");
            return replies.say(Wire::Error(proto::Error::new(ErrorCode::InvalidRequest, message)));
        }
        let finished = commit.finished.is_some();
        if epoch == self.receiver.epoch() && self.receiver.state() == State::Receiving {
            self.commit.get_or_insert(commit);
        }
        self.on(Event::Commit { epoch, finished }, Heard { from: Some((epoch, replies)), offer: None });
    }

    /// A stream that another has replaced may end without harm.
    fn closed(&mut self, epoch: u32, replies: &Replies) {
        if self.stream.take_if(|(_, current)| current.are_of(replies)).is_some() {
            self.on(Event::Lost { epoch }, NOBODY);
        }
    }

    fn mismatch(&self, open: &proto::DeliverOpen) -> Option<proto::Error> {
        let layout = self.pool.memory.layout().fingerprint();
        let message = if open.layout_fingerprint != layout {
            differ("KV layout", open, open.layout_fingerprint, layout)
        } else if open.weights_fingerprint != self.plan.weights_fingerprint {
            differ("weights", open, open.weights_fingerprint, self.plan.weights_fingerprint)
        } else if open.origin.is_some() != self.pool.direct.is_some() {
            format!(
                "prefill member {} hands off {}, this decode worker takes blocks over {}; start both with the same \
                 --transport",
                open.member,
                if open.origin.is_some() { "by letting its memory be read" } else { "over grpc" },
                self.pool.transport()
            )
        } else {
            return None;
        };
        Some(proto::Error::new(ErrorCode::Mismatch, message))
    }

    fn write(&mut self, index: u32, heard: &mut Heard<'_>) {
        let Some((offer, payload)) = heard.offer.take() else {
            return;
        };
        if let Err(error) = self.check(&offer, payload.len()) {
            self.fault = Some(error);
            return self.on(Event::Spoiled { index }, Heard { from: heard.from, offer: None });
        }
        let bytes = self.pool.memory.layout().payload_bytes(offer.rows) as u64;
        let landing = self.land(index, offer, payload);
        self.writes.push(async move { (index, bytes, landing.await) }.boxed());
    }

    fn land(&mut self, index: u32, offer: proto::Offer, payload: Pieces) -> Landing {
        let digest = self.plan.bindings[index as usize].open(offer.digest);
        let place = Place { block: self.plan.blocks[index as usize], rows: offer.rows, digest };
        let after = (self.after)();
        match (offer.address, &self.origin) {
            (Some(address), Some(origin)) => {
                let (origin, reading) = (origin.clone(), Reading::default());
                self.reading.insert(index, (origin.clone(), reading.clone()));
                landing::fetch(&self.pool, place, (origin, reading), address as usize, after)
            }
            _ => landing::copy(&self.pool, place, payload, after),
        }
    }

    /// An offer that no write could take.
    fn check(&mut self, offer: &proto::Offer, payload: usize) -> Result<(), proto::Error> {
        let binding = self.plan.bindings[offer.index as usize];
        let expected = match offer.address {
            None => self.pool.memory.layout().payload_bytes(binding.rows),
            Some(_) => 0,
        };
        let told = offer.address.is_some() == self.pool.direct.is_some();
        if told && offer.rows == binding.rows && payload == expected {
            return Ok(());
        }
        self.received.refused += 1;
        let message = format!(
            "block {} came as {} rows in {} bytes over {}, {} rows in {expected} bytes over {} were expected",
            offer.index,
            offer.rows,
            payload,
            if offer.address.is_some() { "a direct transport" } else { "grpc" },
            binding.rows,
            self.pool.transport(),
        );
        Err(proto::Error::new(ErrorCode::InvalidRequest, message))
    }

    fn written(&mut self, index: u32, bytes: u64, result: Result<(), KvError>) {
        self.reading.remove(&index);
        match result {
            Ok(()) => {
                self.received.bytes += bytes;
                self.received.blocks += 1;
                self.on(Event::Written { index }, NOBODY);
            }
            Err(error @ KvError::Lost(_)) => self.lose(index, &error),
            Err(error) => {
                self.fault = Some(self.spoiled(index, &error));
                self.on(Event::Spoiled { index }, NOBODY);
            }
        }
    }

    fn lose(&mut self, index: u32, error: &KvError) {
        self.received.lost += 1;
        tracing::warn!(
            index,
            %error,
            "a KV block stays quarantined as long as this worker lives; restart the worker once it lacks blocks"
        );
        self.outcome.get_or_insert(Outcome::Severed);
        self.on(Event::Astray { index }, NOBODY);
    }

    /// No deadline can stop what writes, be it this worker's own device or a read from the other side: the reservation ends,
    /// and the block waits. Whoever reads logs and metrics knows.
    fn sever(&mut self, index: u32) {
        self.received.overdue += 1;
        let patience = self.plan.patience.landing;
        if let (Some((origin, reading)), Some((direct, _))) = (self.reading.get(&index), &self.pool.direct)
            && reading.give_up()
        {
            tracing::warn!(
                index,
                ?patience,
                peer = origin.name,
                "a block was not read in time: until the read has ended the block is quarantined, and nothing more is \
                 read from this peer"
            );
            self.outcome.get_or_insert(Outcome::Severed);
            return direct.sever(origin);
        }
        tracing::error!(index, ?patience, "a block has not landed in time: does the device still copy?");
        self.outcome = Some(Outcome::Stalled);
    }

    fn spoiled(&mut self, index: u32, error: &KvError) -> proto::Error {
        let code = match error {
            KvError::Damaged { .. } => {
                self.received.refused += 1;
                ErrorCode::Digest
            }
            _ => ErrorCode::Internal,
        };
        let error = proto::Error::new(code, format!("block {index}: {error}"));
        tracing::warn!(index, %error, "a block cannot be used");
        error
    }

    fn reply(&mut self, epoch: u32, reply: Reply, from: Option<(u32, &Replies)>) {
        let stream = self.stream.as_ref().map(|(epoch, replies)| (*epoch, replies));
        let Some((_, replies)) = [from, stream].into_iter().flatten().find(|(of, _)| *of == epoch) else {
            return;
        };
        replies.say(self.wire(reply));
        if !matches!(reply, Reply::Accept { .. } | Reply::Refuse { .. }) {
            self.stream.take_if(|(of, _)| *of == epoch);
        }
    }

    fn wire(&self, reply: Reply) -> Wire {
        let error = |code, message: String| Wire::Error(proto::Error::new(code, message));
        match reply {
            Reply::Accept { index } => Wire::Accept(proto::Accept { index }),
            Reply::Refuse { index } => Wire::Refuse(proto::Refuse { index, error: self.fault.clone() }),
            Reply::Committed => Wire::Committed(proto::Committed {}),
            Reply::OutOfRange { index } => {
                let message =
                    format!("block {index} was offered, the sequence has {}", self.plan.bindings.len());
                error(ErrorCode::InvalidRequest, message)
            }
            Reply::Stale { current } => {
                error(ErrorCode::StaleEpoch, format!("epoch {current} owns the reservation"))
            }
            Reply::Silent => error(ErrorCode::WorkerLost, "this delivery was silent for too long".into()),
            Reply::Cancelled => error(ErrorCode::Cancelled, "the reservation has ended".into()),
        }
    }
}

/// An ended reservation into whose blocks something still writes: these are nobody's until [`Self::settle`] has
/// returned, the others may be used at once.
pub struct Unsettled(Incoming);

impl Unsettled {
    /// Indices of the blocks that are being written into.
    pub fn writing(&self) -> Vec<u32> {
        self.0.receiver.writing()
    }

    /// Waits for the last write; for ever if the end of one will never be known. `late` hears each time what is new.
    pub async fn settle(self, late: impl Fn(Received)) {
        let Unsettled(mut it) = self;
        while it.receiver.state() == State::Quarantined {
            it.received = Received::default();
            let due = due(it.start, &it.receiver);
            tokio::select! {
                Some((index, bytes, result)) = it.writes.next() => it.written(index, bytes, result),
                () = due => it.on(Event::Tick, NOBODY),
            }
            late(it.received);
        }
    }
}

/// Resolves at the next deadline.
fn due(start: Instant, receiver: &Receiver) -> impl Future<Output = ()> + use<> {
    let due = receiver.deadline();
    async move {
        match due {
            Some(due) => tokio::time::sleep_until(start + due).await,
            None => pending().await,
        }
    }
}

fn differ(what: &str, open: &proto::DeliverOpen, theirs: u64, ours: u64) -> String {
    format!(
        "{what} of prefill member {} ({theirs:016x}) differ from this decode worker's ({ours:016x}); \
         run both with the same model, KV dtype and block size",
        open.member
    )
}

impl Inbox {
    /// Waits for room; `None` when the reservation has ended.
    pub(crate) async fn room(&self) -> Option<mpsc::Permit<'_, Parcel>> {
        self.0.reserve().await.ok()
    }

    /// Resolves when the reservation has ended.
    pub(crate) async fn closed(&self) {
        self.0.closed().await;
    }
}
