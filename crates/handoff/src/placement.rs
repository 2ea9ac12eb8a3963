//! One placement of a sequence on a prefill and a decode member, as the router sees it: a pure state machine.
//! It keeps that the client is given the first token exactly once, that no second prefill is asked before
//! decode has fenced the first, and that whatever ends lets go of both sides. Does no I/O and has no clock. A client
//! that leaves has its placement dropped in whatever state, and both calls with it: each side then frees what it holds.
//! Its table is in PROTOCOL.md, which a test holds to this code.

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Reserved {
        reservation: u64,
        epoch: u32,
        present: u32,
    },
    LocalPrefill,
    /// From the prefill asked in `epoch`.
    FirstToken {
        epoch: u32,
        token: u32,
    },
    Delivered {
        epoch: u32,
    },
    /// Its stream failed, fell silent, or reported an error.
    PrefillLost {
        epoch: u32,
    },
    Advanced {
        epoch: u32,
        accepted: Vec<u32>,
    },
    AlreadyComplete,
    /// With the first token as decode has it from the commit.
    Decoding {
        token: u32,
    },
    Token,
    Finished,
    Preempted,
    DecodeLost,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Choose a prefill member and ask it. `forced`: the client has seen this first token.
    AskPrefill {
        reservation: u64,
        epoch: u32,
        present: u32,
        accepted: Vec<u32>,
        forced: Option<u32>,
    },
    Advance {
        reservation: u64,
        epoch: u32,
    },
    /// Give the client the first token.
    First {
        token: u32,
    },
    /// Give the client the token just received from decode.
    Forward,
    DropPrefill,
    DropDecode,
    End(End),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum End {
    Finished,
    /// Not a failure: continue elsewhere.
    Preempted,
    PrefillLost,
    DecodeLost,
    /// A worker said what it could not say in this state.
    Protocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Reserving,
    Prefilling,
    Delivered,
    Advancing,
    Decoding,
    Ended,
}

/// One attempt; see the table in PROTOCOL.md.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Placement {
    state: State,
    reservation: u64,
    epoch: u32,
    present: u32,
    /// The first token after the sequence, once the client has it.
    first: Option<u32>,
    prefilling: bool,
    /// Prefills that may still be asked.
    tries: u32,
}

impl Placement {
    /// `prefills`: how many prefill members may be tried. What an earlier placement gave the client is part of the
    /// sequence that this one prefills: its own first token is the one after.
    pub fn new(prefills: u32) -> Self {
        Placement {
            state: State::Reserving,
            reservation: 0,
            epoch: 0,
            present: 0,
            first: None,
            prefilling: false,
            tries: prefills,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The first token, once the client has it.
    pub fn first(&self) -> Option<u32> {
        self.first
    }

    pub fn on(&mut self, event: Event) -> Vec<Action> {
        if self.state == State::Ended || self.is_stale(&event) {
            return Vec::new();
        }
        match event {
            // Whoever computed the first token is gone, and nobody told it.
            Event::Finished if self.state != State::Decoding && self.first.is_none() => {
                self.end(End::PrefillLost)
            }
            Event::Finished => self.end(End::Finished),
            Event::Preempted => self.end(End::Preempted),
            Event::DecodeLost => self.end(End::DecodeLost),
            event => self.proceed(event),
        }
    }

    /// A prefill that was given up may still be heard, and anything twice; it means nothing any more.
    fn is_stale(&self, event: &Event) -> bool {
        match event {
            Event::Reserved { .. } => self.state != State::Reserving,
            Event::Advanced { epoch, .. } => *epoch <= self.epoch,
            Event::AlreadyComplete => matches!(self.state, State::Delivered | State::Decoding),
            Event::Decoding { .. } => self.state == State::Decoding,
            Event::FirstToken { epoch, .. }
            | Event::Delivered { epoch }
            | Event::PrefillLost { epoch, .. } => *epoch != self.epoch || !self.prefilling,
            _ => false,
        }
    }

    fn proceed(&mut self, event: Event) -> Vec<Action> {
        use State::*;
        match (self.state, event) {
            (Reserving, Event::Reserved { reservation, epoch, present }) => {
                (self.reservation, self.present) = (reservation, present);
                self.ask(epoch, Vec::new())
            }
            (Reserving, Event::LocalPrefill) => self.enter(Decoding),
            (_, Event::FirstToken { token, .. }) => self.give(token),
            (Prefilling, Event::Delivered { .. }) => self.enter(Delivered),
            (Delivered | Decoding, Event::Delivered { .. }) => Vec::new(),
            (Prefilling, Event::PrefillLost { .. }) => self.prefill_lost(),
            (Delivered | Decoding, Event::PrefillLost { .. }) => self.release_prefill(),
            (Advancing, Event::Advanced { epoch, accepted }) => self.ask(epoch, accepted),
            (Prefilling | Advancing, Event::AlreadyComplete) => self.enter(Delivered),
            (Prefilling | Delivered | Advancing, Event::Decoding { token }) => {
                self.state = Decoding;
                self.give(token)
            }
            (Decoding, Event::Token) => vec![Action::Forward],
            _ => self.end(End::Protocol),
        }
    }

    fn enter(&mut self, state: State) -> Vec<Action> {
        self.state = state;
        Vec::new()
    }

    fn give(&mut self, token: u32) -> Vec<Action> {
        if self.first.is_some() {
            return Vec::new();
        }
        self.first = Some(token);
        vec![Action::First { token }]
    }

    fn ask(&mut self, epoch: u32, accepted: Vec<u32>) -> Vec<Action> {
        self.state = State::Prefilling;
        self.epoch = epoch;
        self.prefilling = true;
        self.tries = self.tries.saturating_sub(1);
        let (reservation, present, forced) = (self.reservation, self.present, self.first);
        vec![Action::AskPrefill { reservation, epoch, present, accepted, forced }]
    }

    fn prefill_lost(&mut self) -> Vec<Action> {
        if self.tries == 0 {
            return self.end(End::PrefillLost);
        }
        let mut actions = self.release_prefill();
        self.state = State::Advancing;
        actions.push(Action::Advance { reservation: self.reservation, epoch: self.epoch });
        actions
    }

    fn release_prefill(&mut self) -> Vec<Action> {
        if std::mem::take(&mut self.prefilling) { vec![Action::DropPrefill] } else { Vec::new() }
    }

    fn end(&mut self, end: End) -> Vec<Action> {
        self.state = State::Ended;
        let mut actions = self.release_prefill();
        if !matches!(end, End::Finished | End::Preempted) {
            actions.push(Action::DropDecode);
        }
        actions.push(Action::End(end));
        actions
    }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
