//! The decode side of one reservation, as a pure state machine: which blocks are here, which epoch owns the
//! right to deliver them, when the whole is complete. Does no I/O and has no clock. It keeps that an accepted
//! block is never written again, that decoding never starts incomplete, and that what is held is freed
//! exactly once, after the last write into it has landed: until then such a block is quarantined, nobody's.
//! A write is a copy of bytes that came or a read of the other side's memory; the machine does not know which.
//! Its table is in PROTOCOL.md, which a test holds to this code.

use std::time::Duration;

/// Time since any fixed moment, the same for all events of one machine.
pub type Now = Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A delivery stream of this epoch opened.
    Open {
        epoch: u32,
    },
    Offer {
        epoch: u32,
        index: u32,
    },
    /// The bytes of a block proved right and are in its place.
    Written {
        index: u32,
    },
    /// The bytes of a block were not those that its digest names, or could not be copied.
    Spoiled {
        index: u32,
    },
    /// How a write ends will never be known; nothing else is told of it.
    Astray {
        index: u32,
    },
    Commit {
        epoch: u32,
        finished: bool,
    },
    /// A sign of life from the delivery stream.
    Heartbeat {
        epoch: u32,
    },
    /// The delivery stream of this epoch ended.
    Lost {
        epoch: u32,
    },
    /// The router gives up the named epoch.
    Advance {
        epoch: u32,
    },
    /// The router's stream ended, or the worker has to stop.
    Cancel,
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Check and copy the offered bytes; then tell [`Event::Written`], [`Event::Spoiled`] or [`Event::Astray`].
    Write { index: u32 },
    /// To the delivery stream of `epoch`.
    Reply { epoch: u32, reply: Reply },
    /// To the router.
    Tell(Answer),
    /// Decode: everything is here.
    Activate,
    /// The first token ended the sequence.
    Finish,
    /// Nobody delivered in time.
    Expire,
    /// Let the blocks go but those of [`Receiver::writing`]: they are nobody's until [`Action::Free`].
    Quarantine,
    /// A write has not landed in time: ask nothing more of whoever writes. It may land at any time, and is told then.
    Sever { index: u32 },
    /// Let go what is still held. Nothing writes into it any more.
    Free,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reply {
    Accept {
        index: u32,
    },
    Refuse {
        index: u32,
    },
    OutOfRange {
        index: u32,
    },
    Committed,
    /// Fenced: `current` owns the reservation.
    Stale {
        current: u32,
    },
    Silent,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    Advanced {
        epoch: u32,
        accepted: Vec<u32>,
    },
    AlreadyComplete,
    /// The router names an epoch that does not exist yet.
    NoSuchEpoch {
        current: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Receiving,
    /// Decoding has begun; the blocks belong to the running sequence.
    Complete,
    /// Ended, but writes are in flight: their blocks cannot be given to others.
    Quarantined,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Block {
    Missing,
    /// `asked`: the current epoch has offered it and waits for an answer. `until`: when it is overdue; `None`
    /// once that was said.
    Writing {
        asked: bool,
        until: Option<Now>,
    },
    Accepted,
}

/// How long to wait, measured from the last sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Patience {
    /// For an open delivery stream to say something.
    pub silence: Duration,
    /// For a delivery stream to open, or for the router to advance after one was lost.
    pub delivery: Duration,
    /// For a write to land; measured from its begin.
    pub landing: Duration,
}

/// One reservation; see the table in PROTOCOL.md.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receiver {
    state: State,
    epoch: u32,
    blocks: Vec<Block>,
    /// Of the current epoch.
    committed: bool,
    /// A commit ended the sequence.
    finished: bool,
    /// A delivery stream of the current epoch is open.
    open: bool,
    heard: Now,
    patience: Patience,
}

impl Receiver {
    /// `present`: leading blocks that are here already, of `blocks`.
    pub fn new(blocks: u32, present: u32, patience: Patience, now: Now) -> Self {
        let block = |index| {
            if index < present { Block::Accepted } else { Block::Missing }
        };
        Receiver {
            state: State::Receiving,
            epoch: 1,
            blocks: (0..blocks).map(block).collect(),
            committed: false,
            finished: false,
            open: false,
            heard: now,
            patience,
        }
    }

    pub fn on(&mut self, event: Event, now: Now) -> Vec<Action> {
        match event {
            Event::Written { index } => self.landed(index, true, now),
            Event::Spoiled { index } => self.landed(index, false, now),
            Event::Astray { index } => self.astray(index),
            Event::Advance { epoch } => self.advance(epoch, now),
            Event::Cancel => self.cancel(),
            Event::Tick => self.tick(now),
            Event::Lost { epoch } => self.lost(epoch, now),
            Event::Open { epoch } | Event::Heartbeat { epoch } if epoch == self.epoch => {
                self.alive(event, now)
            }
            Event::Offer { epoch, index } if epoch == self.epoch => self.offer(index, now),
            Event::Commit { epoch, finished } if epoch == self.epoch => self.commit(finished, now),
            Event::Open { epoch }
            | Event::Heartbeat { epoch }
            | Event::Offer { epoch, .. }
            | Event::Commit { epoch, .. } => {
                vec![Action::Reply { epoch, reply: Reply::Stale { current: self.epoch } }]
            }
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Blocks into which a write has not landed.
    pub fn writing(&self) -> Vec<u32> {
        self.indices(|block| matches!(block, Block::Writing { .. }))
    }

    /// When to send the next [`Event::Tick`].
    pub fn deadline(&self) -> Option<Now> {
        let heard = (self.state == State::Receiving).then(|| self.heard + self.allowed());
        let overdue = self.blocks.iter().filter_map(|block| match block {
            Block::Writing { until, .. } => *until,
            _ => None,
        });
        overdue.chain(heard).min()
    }

    fn indices(&self, of: impl Fn(&Block) -> bool) -> Vec<u32> {
        let numbered = (0u32..).zip(&self.blocks);
        numbered.filter(|(_, block)| of(block)).map(|(index, _)| index).collect()
    }

    fn allowed(&self) -> Duration {
        if self.open { self.patience.silence } else { self.patience.delivery }
    }

    fn reply(&self, reply: Reply) -> Vec<Action> {
        vec![Action::Reply { epoch: self.epoch, reply }]
    }

    fn alive(&mut self, event: Event, now: Now) -> Vec<Action> {
        if self.state != State::Receiving {
            let opened = matches!(event, Event::Open { .. }) && self.state != State::Complete;
            return if opened { self.reply(self.verdict()) } else { Vec::new() };
        }
        self.open = true;
        self.heard = now;
        Vec::new()
    }

    /// What a message after the end is told.
    fn verdict(&self) -> Reply {
        if self.state == State::Complete || self.finished { Reply::Committed } else { Reply::Cancelled }
    }

    fn offer(&mut self, index: u32, now: Now) -> Vec<Action> {
        match self.state {
            State::Receiving => (self.open, self.heard) = (true, now),
            State::Complete => {}
            State::Quarantined | State::Closed => return self.reply(self.verdict()),
        }
        match self.blocks.get_mut(index as usize) {
            None => self.reply(Reply::OutOfRange { index }),
            Some(Block::Accepted) => self.reply(Reply::Accept { index }),
            Some(Block::Writing { asked, .. }) => {
                *asked = true;
                Vec::new()
            }
            Some(block) => {
                *block = Block::Writing { asked: true, until: Some(now + self.patience.landing) };
                vec![Action::Write { index }]
            }
        }
    }

    fn landed(&mut self, index: u32, intact: bool, now: Now) -> Vec<Action> {
        let Some(block) = self.blocks.get_mut(index as usize) else {
            return Vec::new();
        };
        let Block::Writing { asked, .. } = *block else {
            return Vec::new();
        };
        *block = if intact { Block::Accepted } else { Block::Missing };
        if self.state != State::Receiving {
            return self.free_if_quiet();
        }
        self.heard = now;
        let reply = if intact { Reply::Accept { index } } else { Reply::Refuse { index } };
        let mut actions = if asked { self.reply(reply) } else { Vec::new() };
        actions.extend(self.complete_if_whole());
        actions
    }

    /// No reservation can be filled whose block may be written into for ever.
    fn astray(&mut self, index: u32) -> Vec<Action> {
        match self.blocks.get_mut(index as usize) {
            Some(Block::Writing { until, .. }) => *until = None,
            _ => return Vec::new(),
        }
        self.cancel()
    }

    fn commit(&mut self, finished: bool, now: Now) -> Vec<Action> {
        if self.state != State::Receiving {
            return self.reply(self.verdict());
        }
        self.open = true;
        self.heard = now;
        if finished {
            return self.finish();
        }
        self.committed = true;
        self.complete_if_whole()
    }

    fn finish(&mut self) -> Vec<Action> {
        self.finished = true;
        let mut actions = self.reply(Reply::Committed);
        actions.push(Action::Finish);
        actions.extend(self.close());
        actions
    }

    fn complete_if_whole(&mut self) -> Vec<Action> {
        let whole = self.blocks.iter().all(|block| *block == Block::Accepted);
        if !(self.committed && whole) {
            return Vec::new();
        }
        self.state = State::Complete;
        let mut actions = self.reply(Reply::Committed);
        actions.push(Action::Activate);
        actions
    }

    /// A commit of the epoch given up is forgotten: the next prefill may choose its own first token, unless
    /// the router forces the one that the client has seen. Writes in flight go on: their bytes are proved by
    /// their digest, whoever sent them.
    fn advance(&mut self, epoch: u32, now: Now) -> Vec<Action> {
        if self.state != State::Receiving {
            return vec![Action::Tell(Answer::AlreadyComplete)];
        }
        if epoch > self.epoch {
            return vec![Action::Tell(Answer::NoSuchEpoch { current: self.epoch })];
        }
        self.heard = now;
        let mut actions = Vec::new();
        if epoch == self.epoch {
            actions = self.fence();
        }
        actions.push(Action::Tell(Answer::Advanced { epoch: self.epoch, accepted: self.accepted() }));
        actions
    }

    fn fence(&mut self) -> Vec<Action> {
        let old = self.epoch;
        self.epoch += 1;
        self.committed = false;
        for block in &mut self.blocks {
            if let Block::Writing { asked, .. } = block {
                *asked = false;
            }
        }
        let stale = Action::Reply { epoch: old, reply: Reply::Stale { current: self.epoch } };
        if std::mem::take(&mut self.open) { vec![stale] } else { Vec::new() }
    }

    fn accepted(&self) -> Vec<u32> {
        self.indices(|block| *block == Block::Accepted)
    }

    fn lost(&mut self, epoch: u32, now: Now) -> Vec<Action> {
        if self.state == State::Receiving && epoch == self.epoch && self.open {
            self.open = false;
            self.heard = now;
        }
        Vec::new()
    }

    /// A write that is overdue may never land, and its block can be offered to nobody else before: the reservation ends.
    fn tick(&mut self, now: Now) -> Vec<Action> {
        let mut actions = self.sever_overdue(now);
        if !actions.is_empty() {
            actions.extend(self.cancel());
        }
        if self.state != State::Receiving || now < self.heard + self.allowed() {
            return actions;
        }
        if std::mem::take(&mut self.open) {
            self.heard = now;
            actions.extend(self.reply(Reply::Silent));
        } else {
            actions.push(Action::Expire);
            actions.extend(self.close());
        }
        actions
    }

    fn sever_overdue(&mut self, now: Now) -> Vec<Action> {
        let mut actions = Vec::new();
        for (index, block) in (0u32..).zip(&mut self.blocks) {
            if let Block::Writing { until, .. } = block
                && until.take_if(|until| now >= *until).is_some()
            {
                actions.push(Action::Sever { index });
            }
        }
        actions
    }

    fn cancel(&mut self) -> Vec<Action> {
        if self.state != State::Receiving {
            return Vec::new();
        }
        let mut actions = if self.open { self.reply(Reply::Cancelled) } else { Vec::new() };
        actions.extend(self.close());
        actions
    }

    fn close(&mut self) -> Vec<Action> {
        self.open = false;
        self.state = State::Quarantined;
        if self.writing().is_empty() { self.free_if_quiet() } else { vec![Action::Quarantine] }
    }

    fn free_if_quiet(&mut self) -> Vec<Action> {
        if self.state != State::Quarantined || !self.writing().is_empty() {
            return Vec::new();
        }
        self.state = State::Closed;
        vec![Action::Free]
    }
}

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;
