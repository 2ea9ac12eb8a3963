//! The decode worker's driver, reduced to the hand-off: a reservation is filled by the real [`Receiver`], decodes, and
//! ends. Follows `handoff::receive` and `worker::decode`; what it watches is who may use each block.

use crate::{
    model::{Call, Step, Violation},
    network::{Bytes, Message},
    router::Token,
};
use handoff::{
    Now, Patience,
    receiver::{Action, Answer, Event, Receiver, Reply, State},
};
use std::time::Duration;

/// Time stands still but for a tick of a silent stream: every other timer is due at once, whenever it is looked at.
const PATIENCE: Patience =
    Patience { silence: Duration::from_secs(1), delivery: Duration::ZERO, landing: Duration::ZERO };

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    pub receiver: Receiver,
    pub blocks: Vec<Block>,
    commit: Option<Token>,
    /// Decodes after this token.
    pub running: Option<Token>,
    /// The router's call has ended, and this worker has heard it.
    pub cancelled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Block {
    keeper: Keeper,
    /// Being copied into it.
    landing: Option<Bytes>,
    fate: Fate,
    content: Option<Bytes>,
}

/// What becomes of the copy into a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fate {
    Lands,
    /// At some time, or never.
    Hangs,
    /// Likewise, and this worker will not know.
    Lost,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Keeper {
    Call,
    Quarantine,
    /// Others may have it.
    Nobody,
}

impl Held {
    fn new(blocks: u32) -> Held {
        let block = Block { keeper: Keeper::Call, landing: None, fate: Fate::Lands, content: None };
        Held {
            receiver: Receiver::new(blocks, 0, PATIENCE, Now::ZERO),
            blocks: vec![block; blocks as usize],
            commit: None,
            running: None,
            cancelled: false,
        }
    }

    /// Blocks whose write may land.
    pub fn landing(&self) -> impl Iterator<Item = u32> {
        self.indices(|block| block.landing.is_some())
    }

    /// Of these, those whose write will, as far as anybody knows.
    pub fn lands(&self) -> impl Iterator<Item = u32> {
        self.indices(|block| block.landing.is_some() && block.fate == Fate::Lands)
    }

    /// And those whose write hangs.
    pub fn hanging(&self) -> impl Iterator<Item = u32> {
        self.indices(|block| block.landing.is_some() && block.fate == Fate::Hangs)
    }

    fn indices(&self, of: impl Fn(&Block) -> bool) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.blocks).filter(move |(_, block)| of(block)).map(|(index, _)| index)
    }

    pub fn has_lost(&self) -> bool {
        self.blocks.iter().any(|block| block.fate == Fate::Lost)
    }

    /// Into one of its blocks something may write for ever, and what is held is nobody's.
    pub fn only_quarantines(&self) -> bool {
        let may_write = self.blocks.iter().any(|block| block.fate != Fate::Lands);
        may_write && self.running.is_none() && self.blocks.iter().all(|block| block.keeper != Keeper::Call)
    }

    pub fn quarantines(&self) -> bool {
        self.blocks.iter().any(|block| block.keeper == Keeper::Quarantine)
    }

    fn is_over(&self) -> bool {
        let idle = |block: &Block| block.keeper == Keeper::Nobody && block.landing.is_none();
        self.running.is_none() && self.blocks.iter().all(idle)
    }

    fn is_right(&self) -> bool {
        self.blocks.iter().all(|block| (block.landing, block.content) == (None, Some(Bytes::Right)))
    }
}

impl Step<'_> {
    pub fn decode_hears(&mut self, message: Message) {
        match message {
            Message::Start { call } => self.reserve(call),
            Message::Advance { call, epoch } => self.advance(call, epoch),
            Message::Offer { call, epoch, index, bytes } => {
                self.delivered_to(call, epoch, Event::Offer { epoch, index }, Some(bytes));
            }
            Message::Commit { call, epoch, token } => self.commit(call, epoch, token),
            _ => unreachable!("not for decode"),
        }
    }

    fn reserve(&mut self, call: Call) {
        let held = Held::new(self.protocol.bounds.blocks);
        let epoch = held.receiver.epoch();
        self.state.decode.insert(call, held);
        self.send(Message::Reserved { call, epoch });
    }

    /// What keeps blocks and is no reservation any more has no router's call.
    fn advance(&mut self, call: Call, epoch: u32) {
        let ended = |held: &Held| matches!(held.receiver.state(), State::Quarantined | State::Closed);
        if !self.state.decode.get(&call).is_some_and(ended) {
            self.decode_on(call, Event::Advance { epoch }, None);
        }
    }

    /// A delivery to a reservation that is not here is told so.
    fn delivered_to(&mut self, call: Call, epoch: u32, event: Event, bytes: Option<Bytes>) {
        if self.state.decode.contains_key(&call) {
            self.decode_on(call, event, bytes);
        } else {
            self.send(Message::Reply { call, epoch, reply: Reply::Cancelled });
        }
    }

    fn commit(&mut self, call: Call, epoch: u32, token: Token) {
        let epoch = match self.state.decode.get_mut(&call) {
            Some(held) => {
                let epoch = self.protocol.epoch(epoch, &held.receiver);
                if epoch == held.receiver.epoch() && held.receiver.state() == State::Receiving {
                    held.commit.get_or_insert(token);
                }
                epoch
            }
            None => epoch,
        };
        self.delivered_to(call, epoch, Event::Commit { epoch, finished: token.ends() }, None);
    }

    /// Another timer is the reservation's, which includes that of its stream.
    pub fn tick_decode(&mut self, call: Call, of_reservation: bool) {
        let now = if of_reservation { Now::from_secs(1) } else { Now::ZERO };
        self.decode_at(call, Event::Tick, None, now);
    }

    pub fn hear_end(&mut self, call: Call) {
        let epoch = self.state.decode[&call].receiver.epoch();
        if !self.state.prefills.iter().any(|member| member.contains_key(&(call, epoch))) {
            self.decode_on(call, Event::Lost { epoch }, None);
        }
    }

    /// The router's stream has ended.
    pub fn drop_decode(&mut self, call: Call) {
        if self.state.router.life.as_ref().is_some_and(|life| life.call == call) {
            return;
        }
        let held = self.state.decode.get_mut(&call).expect("it is held");
        held.cancelled = true;
        if held.running.take().is_some() {
            self.free(call);
        }
        self.decode_on(call, Event::Cancel, None);
    }

    pub fn land(&mut self, call: Call, index: u32) {
        let held = self.state.decode.get_mut(&call).expect("it is held");
        let block = &mut held.blocks[index as usize];
        let Some(bytes) = block.landing.take() else { return };
        let intact = bytes == Bytes::Right || self.protocol.trusts_bytes();
        block.content = intact.then_some(bytes);
        let told = block.fate != Fate::Lost;
        if told {
            block.fate = Fate::Lands;
        }
        if block.keeper == Keeper::Nobody {
            self.violate(Violation::WrittenAfterFree);
        }
        if !told {
            return;
        }
        let event = if intact { Event::Written { index } } else { Event::Spoiled { index } };
        self.decode_on(call, event, None);
    }

    /// Whoever is read from stands still, or has died without a word.
    pub fn hang(&mut self, call: Call, index: u32) {
        self.state.left.hangs -= 1;
        self.state.decode.get_mut(&call).expect("it is held").blocks[index as usize].fate = Fate::Hangs;
    }

    /// What reads gives no more answers.
    pub fn go_astray(&mut self, call: Call, index: u32) {
        self.state.decode.get_mut(&call).expect("it is held").blocks[index as usize].fate = Fate::Lost;
        let event = if self.protocol.takes_lost_for_ended() {
            Event::Spoiled { index }
        } else {
            Event::Astray { index }
        };
        self.decode_on(call, event, None);
    }

    pub fn end_decoding(&mut self, call: Call, preempted: bool) {
        self.state.decode.get_mut(&call).expect("it is held").running = None;
        self.free(call);
        self.state.decode.remove(&call);
        self.send(if preempted { Message::Preempted { call } } else { Message::Finished { call } });
    }

    fn decode_on(&mut self, call: Call, event: Event, bytes: Option<Bytes>) {
        self.decode_at(call, event, bytes, Now::ZERO);
    }

    fn decode_at(&mut self, call: Call, event: Event, bytes: Option<Bytes>, now: Now) {
        let Some(held) = self.state.decode.get_mut(&call) else { return };
        let (committed, before) = (held.commit.is_some(), held.receiver.epoch());
        let actions = self.protocol.receiver_on(&mut held.receiver, event, now, committed);
        if held.receiver.epoch() != before && !self.protocol.keeps_commits() {
            held.commit = None;
        }
        for action in actions.clone() {
            self.decode_acts(call, action, bytes);
        }
        for action in actions {
            if let Action::Sever { index } = action {
                self.severed(call, index);
            }
        }
        if self.state.decode.get(&call).is_some_and(Held::is_over) {
            self.state.decode.remove(&call);
        }
    }

    fn decode_acts(&mut self, call: Call, action: Action, bytes: Option<Bytes>) {
        let held = self.state.decode.get_mut(&call).expect("it is held");
        match action {
            Action::Write { index } => {
                let block = &mut held.blocks[index as usize];
                block.landing = bytes;
                if block.keeper != Keeper::Call {
                    self.violate(Violation::WrittenAfterFree);
                }
            }
            Action::Reply { epoch, reply } => self.send(Message::Reply { call, epoch, reply }),
            Action::Tell(answer) => self.answer(call, answer),
            Action::Activate => self.activate(call),
            Action::Finish => {
                let token = held.commit.expect("it was committed");
                self.send(Message::Decoding { call, token });
                self.send(Message::Finished { call });
            }
            Action::Quarantine => {
                let landing = |block: &&mut Block| block.landing.is_some();
                held.blocks.iter_mut().filter(landing).for_each(|block| block.keeper = Keeper::Quarantine);
                held.blocks.iter_mut().filter(|block| block.keeper == Keeper::Call).for_each(Block::free);
            }
            Action::Free => self.free(call),
            // The router hears the call end, as it does in any other way.
            Action::Expire => {}
            // It stops nothing.
            Action::Sever { .. } => {}
        }
    }

    fn severed(&mut self, call: Call, index: u32) {
        if self.protocol.takes_severed_for_ended() {
            self.decode_on(call, Event::Spoiled { index }, None);
        }
    }

    fn answer(&mut self, call: Call, answer: Answer) {
        match answer {
            Answer::Advanced { epoch, accepted } => {
                self.send(Message::Advanced { call, epoch, accepted });
            }
            Answer::AlreadyComplete => self.send(Message::AlreadyComplete { call }),
            Answer::NoSuchEpoch { .. } => self.violate(Violation::Protocol),
        }
    }

    fn activate(&mut self, call: Call) {
        let held = self.state.decode.get_mut(&call).expect("it is held");
        held.running = held.commit;
        let (right, cancelled, token) = (held.is_right(), held.cancelled, held.commit);
        match token {
            Some(token) if right => self.send(Message::Decoding { call, token }),
            _ => self.violate(Violation::StartedIncomplete),
        }
        if cancelled {
            self.violate(Violation::StartedCancelled);
        }
    }

    /// What is still held.
    fn free(&mut self, call: Call) {
        let held = self.state.decode.get_mut(&call).expect("it is held");
        let kept: Vec<&mut Block> =
            held.blocks.iter_mut().filter(|block| block.keeper != Keeper::Nobody).collect();
        let (twice, written) = (kept.is_empty(), kept.iter().any(|block| block.landing.is_some()));
        kept.into_iter().for_each(Block::free);
        if twice {
            self.violate(Violation::FreedTwice);
        }
        if written {
            self.violate(Violation::WrittenAfterFree);
        }
    }
}

impl Block {
    fn free(&mut self) {
        self.keeper = Keeper::Nobody;
    }
}
