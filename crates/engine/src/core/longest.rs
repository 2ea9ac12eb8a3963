//! The longest of the last steps: what others measure by whether this engine hangs. One that was long once (the first after a
//! start, a swap of the machine) is forgotten, and does not make a hang look healthy for the life of the process.

use std::time::Duration;

/// Steps after which one is forgotten, at the latest after twice as many.
const REMEMBERED: u32 = 1000;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Longest {
    now: Duration,
    before: Duration,
    steps: u32,
}

impl Longest {
    pub fn add(&mut self, step: Duration) {
        self.now = self.now.max(step);
        self.steps += 1;
        if self.steps == REMEMBERED {
            *self = Longest { now: Duration::ZERO, before: self.now, steps: 0 };
        }
    }

    pub fn get(&self) -> Duration {
        self.now.max(self.before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_step_is_remembered_for_a_while() {
        let (short, long) = (Duration::from_millis(3), Duration::from_secs(30));
        let mut longest = Longest::default();
        longest.add(long);
        (0..REMEMBERED).for_each(|_| longest.add(short));
        assert_eq!(longest.get(), long);
        (0..REMEMBERED).for_each(|_| longest.add(short));
        assert_eq!(longest.get(), short);
    }
}
