//! The router's driver, reduced to the hand-off: a request is placed, and placed again, by the real [`Placement`]. Follows
//! `router::placed`.

use crate::{
    model::{Call, Step, Violation},
    network::Message,
};
use handoff::placement::{Action, End, Event, Placement};

/// A first token. Prefill members choose different ones, and those of the second end the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u32);

impl Token {
    pub fn ends(self) -> bool {
        self.0 % 2 == 1
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Client {
    pub tokens: Vec<Token>,
    pub ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    Finished,
    /// With a clear error.
    Failed,
    /// It left, or its router died.
    Gone,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Router {
    pub life: Option<Life>,
    pub placements: Call,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Life {
    pub call: Call,
    pub placement: Placement,
    /// Epoch of the prefill call that is open.
    pub asked: Option<u32>,
    /// This placement has given its first token.
    pub given: bool,
}

impl Step<'_> {
    pub fn place(&mut self) {
        let router = &mut self.state.router;
        router.placements += 1;
        let call = router.placements;
        let placement = Placement::new(self.protocol.bounds.prefills);
        router.life = Some(Life { call, placement, asked: None, given: false });
        self.send(Message::Start { call });
    }

    /// A message of a call that is not open any more reaches nobody.
    pub fn router_hears(&mut self, message: Message) {
        let Some(life) = &self.state.router.life else { return };
        let (open, asked, first) = (life.call, life.asked, life.placement.first());
        match message {
            Message::Reserved { call, epoch } if call == open => {
                self.tell(Event::Reserved { reservation: call.into(), epoch, present: 0 });
            }
            Message::Advanced { call, epoch, accepted } if call == open => {
                self.tell(Event::Advanced { epoch, accepted });
            }
            Message::AlreadyComplete { call } if call == open => self.tell(Event::AlreadyComplete),
            Message::Decoding { call, token } if call == open => match first {
                Some(other) if other != token.0 => self.end(Ending::Failed),
                _ => self.tell(Event::Decoding { token: token.0 }),
            },
            Message::Finished { call } if call == open => self.tell(Event::Finished),
            Message::Preempted { call } if call == open => self.tell(Event::Preempted),
            Message::FirstToken { call, epoch, token } if call == open => match first {
                Some(other) if other != token.0 && asked == Some(epoch) => self.end(Ending::Failed),
                _ => self.tell(Event::FirstToken { epoch, token: token.0 }),
            },
            Message::Delivered { call, epoch, finished } if call == open => {
                self.delivered(epoch, finished, asked == Some(epoch), first);
            }
            Message::Failed { call, epoch } if call == open => self.prefill_lost(epoch),
            _ => {}
        }
    }

    /// The token comes first on the same stream; a network that reorders may lose it.
    fn delivered(&mut self, epoch: u32, finished: bool, current: bool, first: Option<u32>) {
        match (current, first) {
            (true, None) => self.end(Ending::Failed),
            (true, Some(_)) if finished => self.tell(Event::Finished),
            (false, _) if finished => {}
            _ => self.tell(Event::Delivered { epoch }),
        }
    }

    fn prefill_lost(&mut self, epoch: u32) {
        self.state.router.life.as_mut().expect("it lives").asked.take_if(|asked| *asked == epoch);
        self.tell(Event::PrefillLost { epoch });
    }

    pub fn suspect_prefill(&mut self) {
        if let Some(epoch) = self.state.router.life.as_ref().and_then(|life| life.asked) {
            self.prefill_lost(epoch);
        }
    }

    pub fn suspect_decode(&mut self) {
        self.tell(Event::DecodeLost);
    }

    /// Whoever asked is gone, and its calls with it.
    pub fn leave(&mut self) {
        self.end(Ending::Gone);
    }

    fn end(&mut self, ending: Ending) {
        self.state.router.life = None;
        self.state.client.ending = Some(ending);
    }

    fn tell(&mut self, event: Event) {
        let Some(life) = &mut self.state.router.life else { return };
        for action in self.protocol.placement_on(&mut life.placement, event) {
            self.router_acts(action);
        }
    }

    fn router_acts(&mut self, action: Action) {
        let life = self.state.router.life.as_mut().expect("an end is the last action");
        let call = life.call;
        match action {
            Action::AskPrefill { epoch, accepted, forced, .. } => {
                life.asked = Some(epoch);
                self.send(Message::Ask { call, epoch, accepted, forced: forced.map(Token) });
            }
            Action::Advance { epoch, .. } => self.send(Message::Advance { call, epoch }),
            Action::First { token } => {
                let twice = std::mem::replace(&mut life.given, true);
                self.state.client.tokens.push(Token(token));
                if twice {
                    self.violate(Violation::FirstTokenTwice);
                }
            }
            Action::DropPrefill => life.asked = None,
            // The call ends with the placement.
            Action::Forward | Action::DropDecode => {}
            Action::End(End::Finished) => self.end(Ending::Finished),
            Action::End(End::Protocol) => self.violate(Violation::Protocol),
            Action::End(End::Preempted | End::PrefillLost | End::DecodeLost) => self.elsewhere(),
        }
    }

    /// Goes on from what the client has, unless that ended the answer.
    fn elsewhere(&mut self) {
        if self.state.client.tokens.last().is_some_and(|token| token.ends()) {
            self.end(Ending::Finished);
        } else if self.state.router.placements < self.protocol.bounds.placements {
            self.place();
        } else {
            self.end(Ending::Failed);
        }
    }
}
