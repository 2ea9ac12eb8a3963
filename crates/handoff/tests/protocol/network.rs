//! What is on its way: a bag of messages, in no order.

use crate::{model::Call, router::Token};
use handoff::receiver::Reply;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Network(pub Vec<Message>);

/// Bytes of a block, as their digest finds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bytes {
    Right,
    Wrong,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Message {
    // Router to decode.
    Start { call: Call },
    Advance { call: Call, epoch: u32 },
    // Decode to router.
    Reserved { call: Call, epoch: u32 },
    Advanced { call: Call, epoch: u32, accepted: Vec<u32> },
    AlreadyComplete { call: Call },
    Decoding { call: Call, token: Token },
    Finished { call: Call },
    Preempted { call: Call },
    // Router to prefill.
    Ask { call: Call, epoch: u32, accepted: Vec<u32>, forced: Option<Token> },
    // Prefill to router.
    FirstToken { call: Call, epoch: u32, token: Token },
    Delivered { call: Call, epoch: u32, finished: bool },
    Failed { call: Call, epoch: u32 },
    // Prefill to decode.
    Offer { call: Call, epoch: u32, index: u32, bytes: Bytes },
    Commit { call: Call, epoch: u32, token: Token },
    // Decode to prefill.
    Reply { call: Call, epoch: u32, reply: Reply },
}

impl Message {
    /// Opens a call: a copy of it would be another call.
    pub fn opens(&self) -> bool {
        matches!(self, Message::Start { .. } | Message::Ask { .. })
    }

    /// Of a message to the router.
    pub fn call(&self) -> Option<Call> {
        use Message::*;
        match *self {
            Reserved { call, .. }
            | Advanced { call, .. }
            | AlreadyComplete { call }
            | Decoding { call, .. }
            | Finished { call }
            | Preempted { call }
            | FirstToken { call, .. }
            | Delivered { call, .. }
            | Failed { call, .. } => Some(call),
            _ => None,
        }
    }

    pub fn is_for_router(&self) -> bool {
        use Message::*;
        matches!(
            self,
            Reserved { .. }
                | Advanced { .. }
                | AlreadyComplete { .. }
                | Decoding { .. }
                | Finished { .. }
                | Preempted { .. }
                | FirstToken { .. }
                | Delivered { .. }
                | Failed { .. }
        )
    }

    pub fn is_for_decode(&self) -> bool {
        use Message::*;
        matches!(self, Start { .. } | Advance { .. } | Offer { .. } | Commit { .. })
    }
}

impl Network {
    pub fn send(&mut self, message: Message) {
        let at = self.0.partition_point(|other| *other < message);
        self.0.insert(at, message);
    }

    /// One of each kind of equal messages, with its place.
    pub fn distinct(&self) -> impl Iterator<Item = (usize, &Message)> {
        let repeats = |at: usize| at > 0 && self.0[at - 1] == self.0[at];
        self.0.iter().enumerate().filter(move |(at, _)| !repeats(*at))
    }
}
