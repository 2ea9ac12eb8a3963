//! A prefill worker's driver, reduced to the hand-off: blocks and a first token are computed and delivered by the real
//! [`Sender`]. Follows `handoff::deliver` and `worker::prefill`.

use crate::{
    model::{Call, State, Step, Violation},
    network::{Bytes, Message},
    router::Token,
};
use handoff::{
    Now,
    receiver::Reply,
    sender::{Action, Bounds, Event, Sender},
};
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Delivery {
    sender: Sender,
    computed: u32,
    /// The first token: the one that the client has, else what this member computes.
    token: Token,
    /// Blocks that decode must not need any more before they are let go.
    held: Vec<bool>,
}

type Of = (Call, u32);

impl State {
    pub fn wants_prefill(&self, (call, epoch): Of) -> bool {
        self.router.life.as_ref().is_some_and(|life| life.call == call && life.asked == Some(epoch))
    }
}

impl Step<'_> {
    pub fn prefill_hears(&mut self, message: Message) {
        match message {
            Message::Ask { call, epoch, accepted, forced } => self.asked((call, epoch), &accepted, forced),
            Message::Reply { call, epoch, reply } => self.replied((call, epoch), reply),
            _ => unreachable!("not for prefill"),
        }
    }

    /// Placements and epochs take turns between the members.
    fn asked(&mut self, of: Of, accepted: &[u32], forced: Option<Token>) {
        let at = (usize::from(of.0) + of.1 as usize) % self.state.prefills.len();
        let limits = self.protocol.bounds;
        let bounds = Bounds { window: limits.window, tries: limits.offers, silence: Duration::ZERO };
        let sender = Sender::new(limits.blocks, |index| accepted.contains(&index), bounds, Now::ZERO);
        let token = forced.unwrap_or(Token(2 * u32::from(of.0) + at as u32));
        let held = vec![false; limits.blocks as usize];
        self.state.prefills[at].insert(of, Delivery { sender, computed: 0, token, held });
    }

    fn replied(&mut self, of: Of, reply: Reply) {
        let Some(at) = self.state.prefills.iter().position(|member| member.contains_key(&of)) else { return };
        let event = match reply {
            Reply::Accept { index } => Event::Accepted { index },
            Reply::Refuse { index } => Event::Refused { index },
            Reply::Committed => Event::Committed,
            Reply::OutOfRange { .. } | Reply::Stale { .. } | Reply::Silent | Reply::Cancelled => {
                Event::Broken
            }
        };
        self.prefill_on(at, of, event);
    }

    pub fn compute(&mut self, at: usize, of: Of) {
        let delivery = self.state.prefills[at].get_mut(&of).expect("it computes");
        let (index, token) = (delivery.computed, delivery.token);
        if index == self.protocol.bounds.blocks {
            return;
        }
        delivery.computed += 1;
        delivery.held[index as usize] = true;
        self.prefill_on(at, of, Event::Computed { index });
        if index + 1 == self.protocol.bounds.blocks {
            self.send(Message::FirstToken { call: of.0, epoch: of.1, token });
            self.prefill_on(at, of, Event::FirstToken { finished: token.ends() });
        }
    }

    /// Decode said nothing for too long.
    pub fn tick_prefill(&mut self, at: usize, of: Of) {
        self.prefill_on(at, of, Event::Tick);
    }

    fn prefill_on(&mut self, at: usize, of: Of, event: Event) {
        let Some(delivery) = self.state.prefills[at].get_mut(&of) else { return };
        for action in self.protocol.sender_on(&mut delivery.sender, event) {
            self.prefill_acts(at, of, action);
        }
    }

    fn prefill_acts(&mut self, at: usize, of: Of, action: Action) {
        let (call, epoch) = of;
        let Some(delivery) = self.state.prefills[at].get_mut(&of) else { return };
        let token = delivery.token;
        match action {
            // A worker reads its own memory in no time.
            Action::Read { index } => self.prefill_on(at, of, Event::Fetched { index }),
            Action::Offer { index } => {
                self.send(Message::Offer { call, epoch, index, bytes: Bytes::Right });
            }
            Action::Release { index } => {
                if !std::mem::replace(&mut delivery.held[index as usize], false) {
                    self.violate(Violation::FreedTwice);
                }
            }
            Action::Commit => self.send(Message::Commit { call, epoch, token }),
            Action::Complete => {
                self.state.prefills[at].remove(&of);
                self.send(Message::Delivered { call, epoch, finished: token.ends() });
            }
            Action::Fail(_) => {
                self.state.prefills[at].remove(&of);
                self.send(Message::Failed { call, epoch });
            }
        }
    }
}
