//! A latency observed twice: in the coarse buckets of a Prometheus histogram, for ever, and in fine ones since they
//! were last taken, from which percentiles of the last moments are read.

use crate::{Buckets, Exemplar, TracedHistogram};
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

#[derive(Clone)]
pub struct Latency {
    pub(crate) histogram: TracedHistogram,
    recent: Arc<[AtomicU32; Sketch::BUCKETS]>,
}

impl Latency {
    pub(crate) fn new(buckets: Buckets) -> Self {
        let recent = Arc::new([const { AtomicU32::new(0) }; Sketch::BUCKETS]);
        Latency { histogram: buckets.traced(), recent }
    }

    /// `exemplar` names the request in the bucket that it falls into.
    pub fn observe(&self, seconds: f64, exemplar: Option<Exemplar>) {
        self.histogram.observe(seconds, exemplar, None);
        self.recent[Sketch::bucket(seconds)].fetch_add(1, Relaxed);
    }

    /// What was observed since the last call.
    pub fn take(&self) -> Sketch {
        Sketch { counts: std::array::from_fn(|bucket| self.recent[bucket].swap(0, Relaxed)) }
    }
}

/// Counts in buckets that grow by a ninth of an octave: a quantile read from them is within 4 % of the true one.
#[derive(Clone, Debug)]
pub struct Sketch {
    counts: [u32; Sketch::BUCKETS],
}

impl Default for Sketch {
    fn default() -> Self {
        Sketch { counts: [0; Sketch::BUCKETS] }
    }
}

impl Sketch {
    /// From 0.1 ms to 28 minutes.
    const BUCKETS: usize = 24 * Sketch::PER_OCTAVE;
    const PER_OCTAVE: usize = 9;
    const LEAST: f64 = 0.0001;

    fn bucket(seconds: f64) -> usize {
        let octaves = (seconds / Self::LEAST).max(1.0).log2();
        ((octaves * Self::PER_OCTAVE as f64) as usize).min(Self::BUCKETS - 1)
    }

    pub fn add(&mut self, other: &Sketch) {
        self.counts.iter_mut().zip(other.counts).for_each(|(count, more)| *count += more);
    }

    /// In seconds; `None` if nothing was observed.
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let total: u64 = self.counts.iter().map(|count| u64::from(*count)).sum();
        let rank = ((total as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        })?;
        Some(Self::LEAST * ((bucket as f64 + 0.5) / Self::PER_OCTAVE as f64).exp2())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near_the_true_ones_and_of_the_last_moments_alone() {
        let latency = Latency::new(Buckets::REQUEST);
        (1..=1000).for_each(|ms| latency.observe(f64::from(ms) / 1000.0, None));
        let sketch = latency.take();
        for quantile in [0.5, 0.95, 0.99] {
            let read = sketch.quantile(quantile).unwrap();
            assert!((read / quantile - 1.0).abs() < 0.04, "{quantile}: {read}");
        }
        assert_eq!(latency.take().quantile(0.5), None);
    }

    #[test]
    fn nothing_is_too_short_or_too_long() {
        let latency = Latency::new(Buckets::STEP);
        latency.observe(0.0, None);
        latency.observe(1e9, None);
        let mut sketch = Sketch::default();
        sketch.add(&latency.take());
        assert!(sketch.quantile(0.0).unwrap() < 0.0002 && sketch.quantile(1.0).unwrap() > 1000.0);
    }
}
