//! The prefill side of one delivery, as a pure state machine: which blocks are computed, offered and
//! accepted, how many may be under way at once, when to commit. Does no I/O and has no clock. It keeps that
//! a block is released exactly once, after decode has accepted it, and that a delivery completes only when
//! decode has said so for all of it. A delivery that nobody wants any more is dropped: decode hears its stream end.
//! Its table is in PROTOCOL.md, which a test holds to this code.

use crate::Now;
use std::{collections::VecDeque, time::Duration};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The block's rows are final, or will be when a submitted step has run.
    Computed {
        index: u32,
    },
    /// The bytes asked for by [`Action::Read`] are at hand.
    Fetched {
        index: u32,
    },
    FirstToken {
        finished: bool,
    },
    Accepted {
        index: u32,
    },
    Refused {
        index: u32,
    },
    Committed,
    Heartbeat,
    /// The stream, or the memory that is read from, broke.
    Broken,
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Read { index: u32 },
    Offer { index: u32 },
    Release { index: u32 },
    Commit,
    Complete,
    Fail(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Decode refused the same block as often as allowed.
    Refused {
        index: u32,
    },
    /// Decode confirmed what it cannot have.
    Protocol,
    Silent,
    Broken,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Sending,
    /// The commit is under way; refused blocks may still be sent again.
    Committing,
    Done,
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Block {
    /// Decode has it; to be released when computed.
    Skipped,
    Waiting,
    /// Computed, outside the window.
    Ready,
    Reading,
    Offered,
    Released,
}

/// Bounds of one delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Blocks read or offered and not yet accepted; at least 1.
    pub window: u32,
    /// Times that one block may be offered; at least 1.
    pub tries: u32,
    /// Longest wait for a sign of life.
    pub silence: Duration,
}

/// One delivery; see the table in PROTOCOL.md.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sender {
    state: State,
    blocks: Vec<Block>,
    refusals: Vec<u32>,
    /// Computed blocks that wait for room in the window, oldest first.
    queue: VecDeque<u32>,
    first_token: Option<First>,
    heard: Now,
    bounds: Bounds,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct First {
    finished: bool,
}

impl Sender {
    /// `has(index)`: decode holds that block already.
    pub fn new(blocks: u32, has: impl Fn(u32) -> bool, bounds: Bounds, now: Now) -> Self {
        let block = |index| {
            if has(index) { Block::Skipped } else { Block::Waiting }
        };
        Sender {
            state: State::Sending,
            blocks: (0..blocks).map(block).collect(),
            refusals: vec![0; blocks as usize],
            queue: VecDeque::new(),
            first_token: None,
            heard: now,
            bounds,
        }
    }

    pub fn on(&mut self, event: Event, now: Now) -> Vec<Action> {
        if matches!(self.state, State::Done | State::Failed) {
            return Vec::new();
        }
        match event {
            Event::Computed { index } => self.computed(index),
            Event::Fetched { index } => self.fetched(index),
            Event::FirstToken { finished } => self.first_token(finished),
            Event::Accepted { index } => self.heard(now).accepted(index),
            Event::Refused { index } => self.heard(now).refused(index),
            Event::Committed => self.heard(now).committed(),
            Event::Heartbeat => self.heard(now).quiet(),
            Event::Broken => self.fail(Failure::Broken),
            Event::Tick if now >= self.heard + self.bounds.silence => self.fail(Failure::Silent),
            Event::Tick => Vec::new(),
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    fn heard(&mut self, now: Now) -> &mut Self {
        self.heard = now;
        self
    }

    fn quiet(&mut self) -> Vec<Action> {
        Vec::new()
    }

    fn end(&mut self, state: State) -> Vec<Action> {
        self.state = state;
        self.queue.clear();
        Vec::new()
    }

    fn fail(&mut self, failure: Failure) -> Vec<Action> {
        self.end(State::Failed);
        vec![Action::Fail(failure)]
    }

    fn block(&mut self, index: u32) -> Option<&mut Block> {
        self.blocks.get_mut(index as usize)
    }

    fn computed(&mut self, index: u32) -> Vec<Action> {
        match self.block(index) {
            Some(block @ Block::Skipped) => {
                *block = Block::Released;
                let mut actions = vec![Action::Release { index }];
                actions.extend(self.commit_if_offered());
                actions
            }
            Some(block @ Block::Waiting) => {
                *block = Block::Ready;
                self.queue.push_back(index);
                self.fill_window()
            }
            _ => Vec::new(),
        }
    }

    fn fill_window(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        while self.under_way() < self.bounds.window as usize {
            let Some(index) = self.queue.pop_front() else {
                break;
            };
            self.blocks[index as usize] = Block::Reading;
            actions.push(Action::Read { index });
        }
        actions
    }

    fn under_way(&self) -> usize {
        self.blocks.iter().filter(|block| matches!(block, Block::Reading | Block::Offered)).count()
    }

    fn fetched(&mut self, index: u32) -> Vec<Action> {
        let Some(block @ Block::Reading) = self.block(index) else {
            return Vec::new();
        };
        *block = Block::Offered;
        let mut actions = vec![Action::Offer { index }];
        actions.extend(self.commit_if_offered());
        actions
    }

    fn first_token(&mut self, finished: bool) -> Vec<Action> {
        self.first_token.get_or_insert(First { finished });
        self.commit_if_offered()
    }

    fn commit_if_offered(&mut self) -> Vec<Action> {
        let Some(first) = self.first_token else {
            return Vec::new();
        };
        let settled = |block: &Block| matches!(block, Block::Skipped | Block::Offered | Block::Released);
        if self.state != State::Sending || !(first.finished || self.blocks.iter().all(settled)) {
            return Vec::new();
        }
        self.state = State::Committing;
        if first.finished {
            self.queue.clear();
        }
        vec![Action::Commit]
    }

    fn accepted(&mut self, index: u32) -> Vec<Action> {
        let Some(block @ Block::Offered) = self.block(index) else {
            return Vec::new();
        };
        *block = Block::Released;
        let mut actions = vec![Action::Release { index }];
        actions.extend(self.fill_window());
        actions
    }

    fn refused(&mut self, index: u32) -> Vec<Action> {
        let Some(Block::Offered) = self.block(index) else {
            return Vec::new();
        };
        self.refusals[index as usize] += 1;
        if self.refusals[index as usize] >= self.bounds.tries {
            return self.fail(Failure::Refused { index });
        }
        self.blocks[index as usize] = Block::Reading;
        vec![Action::Read { index }]
    }

    fn committed(&mut self) -> Vec<Action> {
        let delivered = self.blocks.iter().all(|block| matches!(block, Block::Skipped | Block::Released));
        let finished = self.first_token.is_some_and(|first| first.finished);
        if self.state != State::Committing || !(delivered || finished) {
            return self.fail(Failure::Protocol);
        }
        self.end(State::Done);
        vec![Action::Complete]
    }
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;
