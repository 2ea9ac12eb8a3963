//! What must hold in every state, and what must be reached in some, so that the former say something.

use crate::{
    decode::Held,
    model::{Action, Protocol, State, Violation},
    network::Message,
    router::{Ending, Life},
};
use handoff::receiver::{self, Reply};
use stateright::{Model, Property};

pub const FREED_ONCE: &str = "no block is freed twice";
pub const FREED_LAST: &str = "no block is written after it is free";
pub const COMPLETE: &str = "decode starts only from a commit and all blocks, right";
pub const CANCELLED: &str = "a reservation that was cancelled never starts";
pub const SAME_TOKEN: &str = "decode goes on from the first token that the client has";
pub const FIRST_ONCE: &str = "one first token of each placement reaches the client";
pub const PROTOCOL: &str = "no side says what it could not say";
pub const ENDS: &str =
    "at rest the answer has ended, once, and nothing is held but what may be written into for ever";

pub fn all() -> Vec<Property<Protocol>> {
    let mut all = always();
    all.extend(sometimes());
    all
}

fn always() -> Vec<Property<Protocol>> {
    vec![
        Property::always(FREED_ONCE, |_, state: &State| state.keeps(Violation::FreedTwice)),
        Property::always(FREED_LAST, |_, state: &State| state.keeps(Violation::WrittenAfterFree)),
        Property::always(COMPLETE, |_, state: &State| state.keeps(Violation::StartedIncomplete)),
        Property::always(CANCELLED, |_, state: &State| state.keeps(Violation::StartedCancelled)),
        Property::always(FIRST_ONCE, |_, state: &State| state.keeps(Violation::FirstTokenTwice)),
        Property::always(PROTOCOL, |_, state: &State| state.keeps(Violation::Protocol)),
        Property::always(SAME_TOKEN, |_, state: &State| state.agrees_on_first()),
        Property::always(ENDS, |model: &Protocol, state: &State| {
            state.rests_clean() || !at_rest(model, state)
        }),
    ]
}

fn sometimes() -> Vec<Property<Protocol>> {
    vec![
        Property::sometimes("decode finishes the answer", |_, state: &State| {
            state.ended(Ending::Finished) && !state.client.tokens.iter().any(|token| token.ends())
        }),
        Property::sometimes("the first token is the last", |_, state: &State| {
            state.ended(Ending::Finished) && state.client.tokens.iter().any(|token| token.ends())
        }),
        Property::sometimes("the answer fails with an error", |_, state: &State| state.ended(Ending::Failed)),
        Property::sometimes("two epochs deliver at once", |_, state: &State| {
            state.prefills.iter().all(|m| !m.is_empty())
        }),
        Property::sometimes("decode starts from a later epoch", |_, state: &State| {
            state.decode.values().any(|held| held.running.is_some() && held.receiver.epoch() > 1)
        }),
        Property::sometimes("a later epoch forces the token that the client has", |_, state: &State| {
            let forced = |message: &Message| matches!(message, Message::Ask { forced: Some(_), .. });
            state.network.0.iter().any(forced)
        }),
        Property::sometimes("blocks are kept for a later epoch", |_, state: &State| {
            let kept =
                |message: &Message| matches!(message, Message::Ask { accepted, .. } if !accepted.is_empty());
            state.network.0.iter().any(kept)
        }),
        Property::sometimes("an advance comes too late", |_, state: &State| {
            state.network.0.iter().any(|message| matches!(message, Message::AlreadyComplete { .. }))
        }),
        Property::sometimes("an old epoch is fenced", |_, state: &State| {
            state.replies(|r| matches!(r, Reply::Stale { .. }))
        }),
        Property::sometimes("damaged bytes are refused", |_, state: &State| {
            state.replies(|r| matches!(r, Reply::Refuse { .. }))
        }),
        Property::sometimes("blocks are quarantined", |_, state: &State| {
            state.decode.values().any(|held| held.quarantines())
        }),
        Property::sometimes("a quarantined write hangs", |_, state: &State| {
            state.decode.values().any(|held| held.quarantines() && held.hanging().next().is_some())
        }),
        Property::sometimes("a write is lost", |_, state: &State| {
            state.decode.values().any(|held| held.quarantines() && held.has_lost())
        }),
        Property::sometimes("a lost write lands", |_, state: &State| {
            state.decode.values().any(|held| held.has_lost() && held.landing().next().is_none())
        }),
        Property::sometimes("a client leaves while decode receives", |_, state: &State| {
            let receives = |r: &receiver::Receiver| r.state() == receiver::State::Receiving;
            state.ended(Ending::Gone) && state.decode.values().any(|held| receives(&held.receiver))
        }),
        Property::sometimes("a client leaves while decode decodes", |_, state: &State| {
            state.ended(Ending::Gone) && state.decode.values().any(|held| held.running.is_some())
        }),
        Property::sometimes("two placements hold blocks at once", |_, state: &State| state.decode.len() > 1),
        Property::sometimes("the answer goes on elsewhere", |_, state: &State| {
            state.ended(Ending::Finished) && state.client.tokens.len() > 1
        }),
    ]
}

/// Nothing can happen any more but what nobody may wait for: the end of a write that hangs.
fn at_rest(model: &Protocol, state: &State) -> bool {
    let mut actions = Vec::new();
    model.actions(state, &mut actions);
    actions.into_iter().all(|action| state.may_never(action) || model.next_state(state, action).is_none())
}

impl State {
    fn may_never(&self, action: Action) -> bool {
        match action {
            Action::Astray { .. } => true,
            Action::Land { call, index } => self.decode[&call].lands().all(|lands| lands != index),
            _ => false,
        }
    }

    fn keeps(&self, promise: Violation) -> bool {
        self.violation != Some(promise)
    }

    fn ended(&self, ending: Ending) -> bool {
        self.client.ending == Some(ending)
    }

    fn replies(&self, is: fn(&Reply) -> bool) -> bool {
        self.network.0.iter().any(|message| matches!(message, Message::Reply { reply, .. } if is(reply)))
    }

    fn agrees_on_first(&self) -> bool {
        let Some(Life { call, placement, .. }) = &self.router.life else { return true };
        let running = self.decode.get(call).and_then(|held| held.running);
        running.zip(placement.first()).is_none_or(|(token, first)| token.0 == first)
    }

    /// A broken promise ends a run before its rest.
    fn rests_clean(&self) -> bool {
        let kept = self.decode.values().all(Held::only_quarantines);
        let idle = kept && self.prefills.iter().all(|member| member.is_empty());
        let clean = idle && self.router.life.is_none() && self.client.ending.is_some();
        clean || self.violation.is_some()
    }
}
