//! What is checked: one router, one decode worker and two prefill workers, each the real machine behind a driver that only
//! moves messages, over a network that loses, copies, reorders, delays and damages. Any timer may fire at any moment,
//! which stands for every delay; workers crash and come back with nothing; the client may leave at any time. How often the
//! network and the workers fail is bounded, so that the graph is finite and has no cycle.

use crate::{
    broken::Broken,
    decode::Held,
    network::{Bytes, Message, Network},
    prefill::Delivery,
    properties,
    router::{Client, Router},
};
use stateright::{Model, Property};
use std::collections::BTreeMap;

/// A placement and its reservation: never reused, as random ids are not.
pub type Call = u8;

/// Members that prefill.
pub const PREFILLS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Blocks of the sequence.
    pub blocks: u32,
    /// Blocks that a delivery has under way.
    pub window: u32,
    /// Times that a block may be offered by one delivery.
    pub offers: u32,
    /// Prefills asked by one placement, and so epochs.
    pub prefills: u32,
    /// Placements of the request.
    pub placements: u8,
    /// What may go wrong.
    pub faults: Faults,
}

/// How often each may happen in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Faults {
    pub losses: u8,
    pub copies: u8,
    pub damages: u8,
    pub crashes: u8,
    pub hangs: u8,
}

pub struct Protocol {
    pub bounds: Bounds,
    /// What the machines are made to do wrong.
    pub broken: Option<Broken>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub client: Client,
    pub router: Router,
    pub decode: BTreeMap<Call, Held>,
    /// By placement and epoch.
    pub prefills: [BTreeMap<(Call, u32), Delivery>; PREFILLS],
    pub network: Network,
    pub left: Faults,
    /// The first promise that was broken.
    pub violation: Option<Violation>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Violation {
    FreedTwice,
    WrittenAfterFree,
    StartedIncomplete,
    StartedCancelled,
    FirstTokenTwice,
    Protocol,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Deliver(usize),
    Copy(usize),
    Lose(usize),
    /// A bit flips on the way.
    Damage(usize),
    /// A prefill member computes its next block, and with the last one the first token.
    Compute {
        at: usize,
        of: (Call, u32),
    },
    /// A write into a block of decode lands.
    Land {
        call: Call,
        index: u32,
    },
    /// A write lands very late or never.
    Hang {
        call: Call,
        index: u32,
    },
    /// And this worker is told that it will not know.
    Astray {
        call: Call,
        index: u32,
    },
    /// The sequence ends, or has to go elsewhere for want of blocks.
    EndDecoding {
        call: Call,
        preempted: bool,
    },
    /// Timers: of a write, of a whole reservation, of a delivery.
    Overdue {
        call: Call,
    },
    SilentPrefill {
        call: Call,
    },
    SilentDecode {
        at: usize,
        of: (Call, u32),
    },
    /// Decode hears that a delivery's stream has ended.
    HearEnd {
        call: Call,
    },
    /// A worker hears that its router wants it no more.
    DropDecode {
        call: Call,
    },
    DropPrefill {
        at: usize,
        of: (Call, u32),
    },
    /// The router takes a worker for lost, rightly or not.
    SuspectPrefill,
    SuspectDecode,
    Leave,
    CrashRouter,
    CrashDecode,
    CrashPrefill(usize),
}

/// One action under way.
pub struct Step<'a> {
    pub protocol: &'a Protocol,
    pub state: State,
}

impl Step<'_> {
    pub fn send(&mut self, message: Message) {
        self.state.network.send(message);
    }

    pub fn violate(&mut self, violation: Violation) {
        self.state.violation.get_or_insert(violation);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Deliver(at) => self.deliver(at),
            Action::Copy(at) => {
                self.state.left.copies -= 1;
                let message = self.state.network.0[at].clone();
                self.hear(message);
            }
            Action::Lose(at) => {
                self.state.left.losses -= 1;
                self.state.network.0.remove(at);
            }
            Action::Damage(at) => self.damage(at),
            Action::Compute { at, of } => self.compute(at, of),
            Action::Land { call, index } => self.land(call, index),
            Action::Hang { call, index } => self.hang(call, index),
            Action::Astray { call, index } => self.go_astray(call, index),
            Action::EndDecoding { call, preempted } => self.end_decoding(call, preempted),
            Action::Overdue { call } => self.tick_decode(call, false),
            Action::SilentPrefill { call } => self.tick_decode(call, true),
            Action::SilentDecode { at, of } => self.tick_prefill(at, of),
            Action::HearEnd { call } => self.hear_end(call),
            Action::DropDecode { call } => self.drop_decode(call),
            Action::DropPrefill { at, of } => drop(self.state.prefills[at].remove(&of)),
            Action::SuspectPrefill => self.suspect_prefill(),
            Action::SuspectDecode => self.suspect_decode(),
            Action::Leave | Action::CrashRouter => self.leave(),
            Action::CrashDecode => {
                self.state.left.crashes -= 1;
                self.state.decode.clear();
            }
            Action::CrashPrefill(at) => {
                self.state.left.crashes -= 1;
                self.state.prefills[at].clear();
            }
        }
    }

    /// Forgets what will reach nobody any more, whatever happens: calls and deliveries are never opened again.
    fn forget(&mut self) {
        let State { router, decode, prefills, network, .. } = &mut self.state;
        let open = router.life.as_ref().map(|life| life.call);
        let delivers = |call, epoch| prefills.iter().any(|member| member.contains_key(&(call, epoch)));
        network.0.retain(|message| match *message {
            Message::Reply { call, epoch, .. } => delivers(call, epoch),
            Message::Offer { call, epoch, .. } | Message::Commit { call, epoch, .. } => {
                decode.contains_key(&call) || delivers(call, epoch)
            }
            Message::Advance { call, .. } => decode.contains_key(&call),
            ref message => !message.is_for_router() || message.call() == open,
        });
    }

    fn deliver(&mut self, at: usize) {
        let message = self.state.network.0.remove(at);
        self.hear(message);
    }

    fn damage(&mut self, at: usize) {
        self.state.left.damages -= 1;
        if let Message::Offer { call, epoch, index, .. } = self.state.network.0.remove(at) {
            self.send(Message::Offer { call, epoch, index, bytes: Bytes::Wrong });
        }
    }

    fn hear(&mut self, message: Message) {
        if message.is_for_router() {
            self.router_hears(message);
        } else if message.is_for_decode() {
            self.decode_hears(message);
        } else {
            self.prefill_hears(message);
        }
    }
}

impl State {
    fn new(protocol: &Protocol) -> State {
        let faults = protocol.bounds.faults;
        let state = State {
            client: Client::default(),
            router: Router::default(),
            decode: BTreeMap::new(),
            prefills: [BTreeMap::new(), BTreeMap::new()],
            network: Network::default(),
            left: faults,
            violation: None,
        };
        let mut step = Step { protocol, state };
        step.place();
        step.state
    }

    fn network_actions(&self, actions: &mut Vec<Action>) {
        for (at, message) in self.network.distinct() {
            actions.push(Action::Deliver(at));
            if self.left.copies > 0 && !message.opens() {
                actions.push(Action::Copy(at));
            }
            if self.left.losses > 0 {
                actions.push(Action::Lose(at));
            }
            if self.left.damages > 0 && matches!(message, Message::Offer { bytes: Bytes::Right, .. }) {
                actions.push(Action::Damage(at));
            }
        }
    }

    fn worker_actions(&self, actions: &mut Vec<Action>) {
        for (&call, held) in &self.decode {
            actions.extend(held.landing().map(|index| Action::Land { call, index }));
            actions.extend(held.hanging().map(|index| Action::Astray { call, index }));
            if self.left.hangs > 0 {
                actions.extend(held.lands().map(|index| Action::Hang { call, index }));
            }
            if held.running.is_some() {
                let end = |preempted| Action::EndDecoding { call, preempted };
                actions.extend([false, true].map(end));
            }
            actions.extend([Action::Overdue { call }, Action::SilentPrefill { call }]);
            actions.extend([Action::HearEnd { call }, Action::DropDecode { call }]);
        }
        for (at, member) in self.prefills.iter().enumerate() {
            for &of in member.keys() {
                actions.extend([Action::Compute { at, of }, Action::SilentDecode { at, of }]);
                if !self.wants_prefill(of) {
                    actions.push(Action::DropPrefill { at, of });
                }
            }
        }
    }

    fn fate_actions(&self, actions: &mut Vec<Action>) {
        if self.router.life.is_some() {
            actions.extend([
                Action::SuspectPrefill,
                Action::SuspectDecode,
                Action::Leave,
                Action::CrashRouter,
            ]);
        }
        if self.left.crashes == 0 {
            return;
        }
        if !self.decode.is_empty() {
            actions.push(Action::CrashDecode);
        }
        let busy = (0..PREFILLS).filter(|&at| !self.prefills[at].is_empty());
        actions.extend(busy.map(Action::CrashPrefill));
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self)]
    }

    /// Nothing is explored beyond a broken promise.
    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.violation.is_none() {
            state.network_actions(actions);
            state.worker_actions(actions);
            state.fate_actions(actions);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut step = Step { protocol: self, state: last.clone() };
        step.act(action);
        step.forget();
        (step.state != *last).then_some(step.state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}
