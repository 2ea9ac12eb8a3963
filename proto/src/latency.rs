//! Where the time until a token went. Each service on the way has a [`Meter`], which is read whenever the request passes
//! from one part to the next: so the parts of one service leave no gap, and each is measured where it is spent, by one
//! clock. Clocks of different machines are never compared: of a call, the caller knows how long it took and the called
//! service how long it took itself, and the difference is the network's.

use crate::{Latency, Part, PartName, Place};
use std::time::Duration;
use tokio::time::Instant;

/// A stretch of time in one service.
#[derive(Clone, Copy, Debug)]
pub struct Lap {
    pub name: PartName,
    pub place: Place,
    /// Of which token's time, as records and spans have it.
    pub of: &'static str,
    pub from: Instant,
    pub to: Instant,
}

/// The time of one request in one service, until its second token.
#[derive(Debug)]
pub struct Meter {
    /// Where the time of the next token begins.
    mark: Instant,
    last: Instant,
    /// Of the next token.
    latency: Latency,
    /// Of all tokens: what this service did itself.
    laps: Vec<Lap>,
    tokens: usize,
}

/// The tokens that are measured, by what the time until each is called.
const OF: [&str; 2] = ["ttft", "second_token"];

impl Meter {
    pub fn start(at: Instant) -> Self {
        Meter { mark: at, last: at, latency: Latency::default(), laps: Vec::new(), tokens: 0 }
    }

    /// The same where the first token comes from elsewhere.
    pub fn after_first(at: Instant) -> Self {
        Meter { tokens: 1, ..Meter::start(at) }
    }

    /// Whether there is a token still to be measured.
    pub fn runs(&self) -> bool {
        self.of().is_some()
    }

    /// Since it was last read, the time went here.
    pub fn lap(&mut self, name: PartName, place: Place) {
        self.lap_until(Instant::now(), name, place);
    }

    /// The same up to a moment that has passed already.
    pub fn lap_until(&mut self, at: Instant, name: PartName, place: Place) {
        let Some(of) = self.of().filter(|_| at > self.last) else { return };
        let lap = Lap { name, place, of, from: self.last, to: at };
        self.latency.add(name, place, nanoseconds(at - self.last));
        match self.laps.last_mut() {
            Some(before) if (before.name, before.of, before.to) == (name, of, lap.from) => before.to = at,
            _ => self.laps.push(lap),
        }
        self.last = at;
    }

    /// Since it was last read, a call was under way. `said`: by the called service; without its word the time is lost.
    pub fn call(&mut self, said: Option<&Latency>, caller: Place) {
        let Some(said) = said else { return self.lap(PartName::Lost, caller) };
        if !self.runs() {
            return;
        }
        let now = Instant::now();
        said.parts.iter().for_each(|part| self.latency.add(part.name(), part.place(), part.ns));
        let network = nanoseconds(now - self.last) - i64::try_from(said.own_ns).unwrap_or(i64::MAX);
        self.latency.add(PartName::WayBack, Place::Network, network);
        self.last = now;
    }

    /// A token is passed on now: what to say with it. `None` from the third on.
    pub fn token(&mut self, place: Place) -> Option<Latency> {
        self.lap(PartName::WayBack, place);
        if !self.runs() {
            return None;
        }
        self.tokens += 1;
        let own_ns = nanoseconds(self.last - self.mark).unsigned_abs();
        self.mark = self.last;
        Some(Latency { own_ns, ..std::mem::take(&mut self.latency) })
    }

    fn of(&self) -> Option<&'static str> {
        OF.get(self.tokens).copied()
    }

    pub fn laps(&self) -> &[Lap] {
        &self.laps
    }
}

impl Latency {
    fn add(&mut self, name: PartName, place: Place, ns: i64) {
        let same = |part: &&mut Part| (part.name(), part.place()) == (name, place);
        match self.parts.iter_mut().find(same) {
            Some(part) => part.ns = part.ns.saturating_add(ns),
            None => self.parts.push(Part { name: name as i32, place: place as i32, ns }),
        }
    }

    /// What no part accounts for.
    pub fn unexplained_ns(&self) -> i64 {
        let told = self.parts.iter().fold(0i64, |sum, part| sum.saturating_add(part.ns));
        i64::try_from(self.own_ns).unwrap_or(i64::MAX).saturating_sub(told)
    }
}

impl PartName {
    /// As records and spans have it.
    pub fn label(self) -> &'static str {
        match self {
            PartName::Gateway => "gateway",
            PartName::Queue => "queue",
            PartName::Reservation => "reservation",
            PartName::PrefillWait => "prefill_wait",
            PartName::Prefill => "prefill",
            PartName::WayBack => "way_back",
            PartName::Handoff => "handoff",
            PartName::DecodeWait => "decode_wait",
            PartName::Decode => "decode",
            PartName::Lost => "lost",
            PartName::Unspecified => "unspecified",
        }
    }
}

impl Place {
    /// As records and spans have it.
    pub fn label(self) -> &'static str {
        match self {
            Place::Gateway => "gateway",
            Place::Router => "router",
            Place::Prefill => "prefill",
            Place::Decode => "decode",
            Place::Network => "network",
            Place::Unspecified => "unspecified",
        }
    }
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn parts(latency: &Latency) -> Vec<(&str, &str, i64)> {
        let one = |part: &Part| (part.name().label(), part.place().label(), part.ns / 1_000_000);
        latency.parts.iter().map(one).collect()
    }

    #[test]
    fn the_parts_of_a_service_leave_no_gap() {
        let start = Instant::now() - ms(100);
        let mut meter = Meter::start(start);
        meter.lap_until(start + ms(10), PartName::Queue, Place::Router);
        meter.lap_until(start + ms(13), PartName::Reservation, Place::Router);
        meter.lap_until(start + ms(12), PartName::Lost, Place::Router);
        meter.lap_until(start + ms(20), PartName::Queue, Place::Router);
        let first = meter.token(Place::Router).unwrap();
        assert_eq!(parts(&first)[..2], [("queue", "router", 17), ("reservation", "router", 3)]);
        assert_eq!((first.unexplained_ns(), first.own_ns >= 100_000_000), (0, true));
        assert_eq!(meter.laps().len(), 4, "{:?}", meter.laps());
        assert!(
            meter.token(Place::Router).unwrap().own_ns < 100_000_000,
            "the second begins where the first ended"
        );
        assert_eq!(meter.token(Place::Router), None);
    }

    #[test]
    fn of_a_call_the_network_has_what_the_callee_has_not() {
        let mut meter = Meter::start(Instant::now() - ms(100));
        let computed = Part { name: PartName::Prefill as i32, place: Place::Prefill as i32, ns: 70_000_000 };
        let said = Latency { own_ns: 75_000_000, parts: vec![computed], ..Latency::default() };
        meter.call(Some(&said), Place::Router);
        let told = meter.token(Place::Router).unwrap();
        assert_eq!(parts(&told)[0], ("prefill", "prefill", 70));
        assert_eq!((told.parts[1].place(), told.parts[1].ns >= 25_000_000), (Place::Network, true));
        let unexplained = told.unexplained_ns() / 1_000_000;
        assert_eq!(unexplained, 5, "what the callee does not account for nobody does");
    }
}
