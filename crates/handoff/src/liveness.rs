//! Whether a peer lives, judged by what it says and by whether its engine moves. A pure function of the
//! heartbeats it was told and the time: an open socket proves nothing, and neither does a long queue. What a step may
//! take follows from the longest that the peer has ever measured, which each heartbeat carries, so that a stream that
//! has just opened knows it too.

use crate::Now;
use std::time::Duration;

/// A step that takes this many times the longest ever seen counts as stuck.
const MARGIN: u32 = 10;

/// How long a device may take for anything, if its longest step took `longest`.
pub fn patience(silence: Duration, longest: Duration) -> Duration {
    silence.max(longest * MARGIN)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    Alive,
    /// Nothing was heard for too long.
    Silent,
    /// It talks, has work, and its step counter does not move.
    Stuck,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Liveness {
    silence: Duration,
    heard: Now,
    step: u64,
    /// Last time that the step counter moved or there was nothing to do.
    moved: Now,
    working: bool,
    /// Longest step that the peer has told of, or time between two with work present.
    longest: Duration,
}

impl Liveness {
    /// `silence`: longest time without any message, and the shortest after which an engine counts as stuck.
    pub fn new(silence: Duration, now: Now) -> Self {
        Liveness { silence, heard: now, step: 0, moved: now, working: false, longest: Duration::ZERO }
    }

    /// Any message at all.
    pub fn heard(&mut self, now: Now) {
        self.heard = now;
    }

    /// `longest`: the longest of the peer's last steps, a thousand at least.
    pub fn heartbeat(&mut self, step: u64, working: bool, longest: Duration, now: Now) {
        self.heard = now;
        self.longest = self.longest.max(longest);
        if step != self.step && self.working && working {
            self.longest = self.longest.max(now.saturating_sub(self.moved));
        }
        if step != self.step || !working || !self.working {
            self.moved = now;
        }
        (self.step, self.working) = (step, working);
    }

    pub fn verdict(&self, now: Now) -> Verdict {
        if now.saturating_sub(self.heard) > self.silence {
            Verdict::Silent
        } else if self.working && now.saturating_sub(self.moved) > patience(self.silence, self.longest) {
            Verdict::Stuck
        } else {
            Verdict::Alive
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Now {
        Now::from_secs(seconds)
    }

    #[test]
    fn silence_is_death_and_so_is_an_engine_that_stands_still() {
        let mut peer = Liveness::new(at(10), at(0));
        assert_eq!(peer.verdict(at(10)), Verdict::Alive);
        assert_eq!(peer.verdict(at(11)), Verdict::Silent);
        for second in 1..=30 {
            peer.heartbeat(7, second > 15, at(0), at(second));
        }
        assert_eq!(peer.verdict(at(26)), Verdict::Alive, "work came at 16");
        assert_eq!(peer.verdict(at(30)), Verdict::Stuck);
    }

    #[test]
    fn slow_steps_teach_patience() {
        let mut peer = Liveness::new(at(10), at(0));
        for second in 0..=8 {
            peer.heartbeat(1, true, at(0), at(second));
        }
        peer.heartbeat(2, true, at(0), at(9));
        for second in 10..=60 {
            peer.heartbeat(2, true, at(0), at(second));
        }
        assert_eq!(peer.verdict(at(60)), Verdict::Alive, "a step took 9 s, so 90 s are allowed");
    }

    #[test]
    fn a_new_stream_knows_how_slow_steps_have_been() {
        let mut peer = Liveness::new(at(10), at(0));
        for second in 0..=121 {
            peer.heartbeat(1, true, at(12), at(second));
            let expected = if second <= 120 { Verdict::Alive } else { Verdict::Stuck };
            assert_eq!(
                peer.verdict(at(second)),
                expected,
                "after {second} s of a step; one of 12 s is on record"
            );
        }
    }
}
