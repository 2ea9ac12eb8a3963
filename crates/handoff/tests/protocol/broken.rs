//! The machines as the model runs them: the real ones, or the real ones made to break one rule at their boundary. Each
//! broken one must be found out, or the properties prove nothing.

use crate::model::Protocol;
use handoff::{
    Now,
    placement::{self, Placement},
    receiver::{Action, Event, Receiver, State},
    sender::{self, Sender},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Decode takes messages of any epoch for those of the current one.
    NoEpochCheck,
    /// Decode frees while something still writes.
    EarlyFree,
    /// Decode frees twice.
    DoubleFree,
    /// Prefill lets a block go twice.
    DoubleRelease,
    /// Decode starts once there is a commit.
    StartsIncomplete,
    /// Decode goes on for a router that has left.
    IgnoresCancel,
    /// A commit outlives the epoch that it was of.
    LateCommit,
    /// Decode believes bytes without looking at their digest.
    NoDigest,
    /// The router gives each first token that it hears.
    RepeatsFirst,
    /// Decode takes a write that it has severed for one that has ended.
    SeveredEnded,
    /// Decode takes a write whose end it will never know for one that has ended.
    LostEnded,
}

impl Protocol {
    fn is(&self, broken: Broken) -> bool {
        self.broken == Some(broken)
    }

    pub fn trusts_bytes(&self) -> bool {
        self.is(Broken::NoDigest)
    }

    pub fn keeps_commits(&self) -> bool {
        self.is(Broken::LateCommit)
    }

    /// The epoch that a message is taken to be of.
    pub fn epoch(&self, epoch: u32, receiver: &Receiver) -> u32 {
        if self.is(Broken::NoEpochCheck) { receiver.epoch() } else { epoch }
    }

    /// `committed`: the driver has a commit at hand.
    pub fn receiver_on(&self, it: &mut Receiver, event: Event, now: Now, committed: bool) -> Vec<Action> {
        let before = it.epoch();
        let starts = matches!(event, Event::Commit { epoch, finished: false } if epoch == before);
        if self.is(Broken::IgnoresCancel) && event == Event::Cancel {
            return Vec::new();
        }
        let mut actions = it.on(self.misread(event, it), now);
        if self.is(Broken::StartsIncomplete) && starts && it.state() == State::Receiving {
            actions.push(Action::Activate);
        }
        if self.is(Broken::LateCommit) && committed && it.epoch() != before {
            actions.extend(it.on(Event::Commit { epoch: it.epoch(), finished: false }, now));
        }
        actions.into_iter().flat_map(|action| self.misdo(action)).collect()
    }

    fn misread(&self, event: Event, it: &Receiver) -> Event {
        match event {
            Event::Offer { epoch, index } => Event::Offer { epoch: self.epoch(epoch, it), index },
            event => event,
        }
    }

    fn misdo(&self, action: Action) -> Vec<Action> {
        match (self.broken, action) {
            (Some(Broken::EarlyFree), Action::Quarantine) => vec![Action::Free],
            (Some(Broken::DoubleFree), Action::Free) => vec![Action::Free, Action::Free],
            (_, action) => vec![action],
        }
    }

    pub fn takes_severed_for_ended(&self) -> bool {
        self.is(Broken::SeveredEnded)
    }

    pub fn takes_lost_for_ended(&self) -> bool {
        self.is(Broken::LostEnded)
    }

    pub fn sender_on(&self, it: &mut Sender, event: sender::Event) -> Vec<sender::Action> {
        let mut actions = it.on(event, Now::ZERO);
        let release = actions.iter().find(|action| matches!(action, sender::Action::Release { .. }));
        if self.is(Broken::DoubleRelease) {
            actions.extend(release.cloned());
        }
        actions
    }

    pub fn placement_on(&self, it: &mut Placement, event: placement::Event) -> Vec<placement::Action> {
        let token = match event {
            placement::Event::FirstToken { token, .. } | placement::Event::Decoding { token } => Some(token),
            _ => None,
        };
        let mut actions = it.on(event);
        if self.is(Broken::RepeatsFirst) && actions.is_empty() {
            actions.extend(token.map(|token| placement::Action::First { token }));
        }
        actions
    }
}
