//! Trying again without a storm: jittered, bounded back-off, and a log line per change of state
//! instead of one per attempt.

use std::{
    fmt::Display,
    hash::{BuildHasher, RandomState},
    time::Duration,
};

const FIRST: Duration = Duration::from_millis(50);

/// Delays that double up to `longest`, each drawn from the upper half of its step, so that
/// processes that lost the same peer at the same moment do not come back at the same moment.
pub(crate) struct Backoff {
    step: Duration,
    longest: Duration,
}

impl Backoff {
    pub fn new(longest: Duration) -> Self {
        let step = FIRST.min(longest);
        Self { step, longest }
    }

    /// For members under a lease: several attempts fit into one, so that everybody is back within
    /// one lease after an outage.
    pub fn within_lease(lease: Duration) -> Self {
        Self::new((lease / 4).min(Duration::from_secs(2)))
    }

    pub fn next(&mut self) -> Duration {
        let delay = self.step.mul_f64(0.5 + 0.5 * random_unit());
        self.step = (self.step * 2).min(self.longest);
        delay
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.longest);
    }
}

/// Which of `count` to try first.
pub(crate) fn random_below(count: usize) -> usize {
    (random_unit() * count as f64) as usize
}

/// In [0, 1). The standard library keys each `RandomState` anew: enough for jitter.
fn random_unit() -> f64 {
    let bits = RandomState::new().hash_one(0u8) >> 11;
    bits as f64 / (1u64 << 53) as f64
}

/// Says when a peer is lost and when it is back, once each.
pub(crate) struct Link {
    subject: String,
    up: Option<bool>,
}

impl Link {
    pub fn new(subject: impl Into<String>) -> Self {
        let subject = subject.into();
        Self { subject, up: None }
    }

    pub fn up(&mut self) {
        if self.up.replace(true) != Some(true) {
            tracing::info!("{}: connected", self.subject);
        }
    }

    pub fn down(&mut self, cause: &dyn Display) {
        if self.up.replace(false) != Some(false) {
            tracing::warn!("{}: no connection, trying until there is one: {cause}", self.subject);
        }
    }

    pub fn ended(self, cause: &dyn Display) {
        tracing::warn!("{}: ended: {cause}", self.subject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_their_bound_and_differ() {
        let longest = Duration::from_millis(400);
        let mut backoff = Backoff::new(longest);
        let delays: Vec<_> = (0..40).map(|_| backoff.next()).collect();
        assert!(delays[0] <= FIRST && delays.iter().all(|delay| *delay <= longest));
        assert!(delays[10..].iter().all(|delay| *delay >= longest / 2));
        assert!(delays[10..].windows(2).any(|pair| pair[0] != pair[1]));
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
