//! A token bucket that is exact: it holds at most a minute's worth, fills evenly, and says to the nanosecond when there will
//! be enough. What was taken too much is given back, and what was taken too little is owed. Knows no clock.

use std::time::Duration;
use tokio::time::Instant;

/// Parts of one token: as many as a minute has nanoseconds, so that each nanosecond brings `per_minute` parts.
const PARTS: i128 = 60_000_000_000;

#[derive(Clone, Debug)]
pub struct Bucket {
    per_minute: u32,
    /// Below 0: owed.
    parts: i128,
    at: Instant,
}

impl Bucket {
    /// Full.
    pub fn new(per_minute: u32, now: Instant) -> Self {
        Bucket { per_minute, parts: i128::from(per_minute) * PARTS, at: now }
    }

    pub fn per_minute(&self) -> u32 {
        self.per_minute
    }

    /// Keeps what has been taken; but a smaller bucket owes nothing that the larger one did not.
    pub fn resize(&mut self, per_minute: u32, now: Instant) {
        self.fill(now);
        let kept = self.parts + (i128::from(per_minute) - i128::from(self.per_minute)) * PARTS;
        self.parts = kept.max(self.parts.min(0));
        self.per_minute = per_minute;
    }

    /// Takes `amount` and returns it; or says how long until that can be. More than the bucket can hold is taken when it is
    /// full, and only as much as it holds: otherwise it could never be had.
    pub fn take(&mut self, amount: u64, now: Instant) -> Result<u64, Duration> {
        let amount = amount.min(self.per_minute.into());
        self.holds(amount, now)?;
        self.parts -= i128::from(amount) * PARTS;
        Ok(amount)
    }

    /// Takes nothing; says how long until `amount` is there if it is not.
    pub fn holds(&mut self, amount: u64, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        let missing = i128::from(amount) * PARTS - self.parts;
        if missing > 0 { Err(self.time_for(missing)) } else { Ok(()) }
    }

    /// Makes what was taken into what was used.
    pub fn settle(&mut self, taken: u64, used: u64, now: Instant) {
        self.fill(now);
        let parts = self.parts + (i128::from(taken) - i128::from(used)) * PARTS;
        self.parts = parts.min(self.whole());
    }

    /// Whole tokens there are.
    pub fn remaining(&self, now: Instant) -> u64 {
        let parts = self.clone().filled(now).max(0) / PARTS;
        u64::try_from(parts).unwrap_or(u64::MAX)
    }

    /// Until it is full.
    pub fn reset(&self, now: Instant) -> Duration {
        let parts = self.clone().filled(now);
        self.time_for(self.whole() - parts)
    }

    fn fill(&mut self, now: Instant) {
        self.filled(now);
    }

    fn filled(&mut self, now: Instant) -> i128 {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        let gained = i128::try_from(passed).unwrap_or(i128::MAX).saturating_mul(self.per_minute.into());
        self.parts = self.parts.saturating_add(gained).min(self.whole());
        self.at = self.at.max(now);
        self.parts
    }

    fn whole(&self) -> i128 {
        i128::from(self.per_minute) * PARTS
    }

    fn time_for(&self, parts: i128) -> Duration {
        let rate = i128::from(self.per_minute.max(1));
        let nanos = (parts.max(0) + rate - 1) / rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_missing_comes_exactly_when_it_says() {
        let start = Instant::now();
        let mut bucket = Bucket::new(60, start);
        assert_eq!(bucket.take(60, start), Ok(60));
        assert_eq!(bucket.take(1, start), Err(SECOND));
        assert_eq!(bucket.take(1, start + SECOND - Duration::from_nanos(1)), Err(Duration::from_nanos(1)));
        assert_eq!(bucket.take(1, start + SECOND), Ok(1));
        assert_eq!((bucket.remaining(start + SECOND), bucket.reset(start + SECOND)), (0, 60 * SECOND));
        assert_eq!(bucket.remaining(start + 3600 * SECOND), 60, "and no more than a minute's");
        let mut odd = Bucket::new(7, start);
        odd.take(7, start).unwrap();
        let wait = odd.take(1, start).unwrap_err();
        assert_eq!(odd.take(1, start + wait), Ok(1), "rounded up");
    }

    #[test]
    fn the_unused_comes_back_and_the_overdrawn_is_owed() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, start);
        bucket.take(80, start).unwrap();
        bucket.settle(80, 30, start);
        assert_eq!(bucket.remaining(start), 70);
        bucket.settle(0, 130, start);
        assert_eq!((bucket.remaining(start), bucket.take(0, start).is_err()), (0, true), "60 are owed");
        assert_eq!(bucket.take(10, start), Err(42 * SECOND));
        bucket.settle(1000, 0, start);
        assert_eq!(bucket.remaining(start), 100, "never more than a minute's");
    }

    #[test]
    fn what_no_bucket_holds_takes_a_full_one() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, start);
        bucket.take(1, start).unwrap();
        assert!(bucket.take(1_000_000, start).is_err());
        assert_eq!(bucket.take(1_000_000, start + SECOND), Ok(100));
    }

    #[test]
    fn another_size_keeps_what_was_taken() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, start);
        bucket.take(30, start).unwrap();
        bucket.resize(50, start);
        assert_eq!(bucket.remaining(start), 20);
        bucket.resize(100, start);
        assert_eq!(bucket.remaining(start), 70);
    }
}
