//! The last fifteen minutes, one sample every two seconds: latencies and endings as this gateway measured them, and
//! what the members and routers have counted, as rates. Bounded; lost when the gateway ends, as Prometheus is for the
//! long run. Every gateway keeps its own, so nobody has to be asked who may be gone.

use crate::cluster::Seen;
use proto::{Load, Totals};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use telemetry::Sketch;
use telemetry::gateway::{Endings, Metrics};

pub const INTERVAL: Duration = Duration::from_secs(2);
const SAMPLES: usize = 450;
/// Intervals that a percentile is taken over: of two seconds alone it would jump.
const WINDOW: usize = 15;

/// What the values of a sample are. Rates are per second, times milliseconds, counts of events those of the interval.
pub const FIELDS: [&str; 28] = [
    "at_ms",
    "ttft_p50",
    "ttft_p95",
    "ttft_p99",
    "itl_p50",
    "itl_p95",
    "itl_p99",
    "answered",
    "refused",
    "left",
    "failed",
    "running",
    "queued",
    "prompt_tokens_rate",
    "completion_tokens_rate",
    "handoff_bytes_rate",
    "handoff_rate",
    "handoff_ms",
    "blocks_used",
    "blocks_cached",
    "blocks_quarantined",
    "blocks_total",
    "preempted",
    "prefill_lost",
    "decode_lost",
    "drained",
    "ready",
    "in_flight",
];

pub type Sample = [Option<f64>; FIELDS.len()];

#[derive(Default)]
pub struct History {
    samples: VecDeque<Sample>,
    /// Time to first token and between tokens, of the latest intervals.
    latencies: VecDeque<[Sketch; 2]>,
    before: Option<Counted>,
}

/// What only grows, as it was at the last sample.
#[derive(Clone, Default)]
struct Counted {
    at_ms: u64,
    /// When the routers last said what stands in `members`.
    seen_ms: u64,
    endings: Endings,
    members: HashMap<String, Totals>,
    /// By router and cause.
    migrations: HashMap<(String, String), u64>,
}

const CAUSES: [&str; 4] = ["preempted", "prefill_lost", "decode_lost", "drained"];

impl History {
    /// The samples after `since`, milliseconds since the epoch, the oldest first.
    pub fn since(&self, since: u64) -> Vec<Sample> {
        let later = |sample: &&Sample| sample[0].is_some_and(|at| at > since as f64);
        self.samples.iter().filter(later).copied().collect()
    }

    /// Takes a sample; `seen` is what the routers said just now, if any did.
    pub fn sample(&mut self, metrics: &Metrics, seen: Option<&Seen>) {
        let at_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
        self.latencies.push_back([metrics.time_to_first_token.take(), metrics.inter_token_latency.take()]);
        if self.latencies.len() > WINDOW {
            self.latencies.pop_front();
        }
        let before = self.before.take();
        let now = Counted::of(at_ms, metrics.endings(), seen, before.as_ref());
        // The first time there is nothing to compare with.
        if let Some(before) = before {
            let sample = self.compare(&before, &now, seen, metrics.in_flight.get());
            if self.samples.len() == SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back(sample);
        }
        self.before = Some(now);
    }

    fn compare(&self, before: &Counted, now: &Counted, seen: Option<&Seen>, in_flight: i64) -> Sample {
        let mut sample = [None; FIELDS.len()];
        let mut values = vec![Some(now.at_ms as f64)];
        for which in 0..2 {
            values.extend(self.percentiles(which));
        }
        let (past, ended) = (before.endings, now.endings);
        values.extend([
            Some((ended.answered - past.answered) as f64),
            Some((ended.refused - past.refused) as f64),
            Some((ended.left - past.left) as f64),
            Some((ended.failed - past.failed) as f64),
        ]);
        match seen {
            Some(seen) => values.extend(cluster(before, now, seen)),
            None => values.resize(FIELDS.len() - 1, None),
        }
        values.push(Some(in_flight as f64));
        sample.iter_mut().zip(values).for_each(|(place, value)| *place = value.map(rounded));
        sample
    }

    /// p50, p95, p99 in milliseconds.
    fn percentiles(&self, which: usize) -> [Option<f64>; 3] {
        let mut sketch = Sketch::default();
        self.latencies.iter().for_each(|latencies| sketch.add(&latencies[which]));
        [0.5, 0.95, 0.99].map(|quantile| sketch.quantile(quantile).map(|seconds| seconds * 1000.0))
    }
}

impl Counted {
    /// Without an answer from the routers, what was known of them stays: the next sample has it all.
    fn of(at_ms: u64, endings: Endings, seen: Option<&Seen>, before: Option<&Counted>) -> Self {
        let Some(seen) = seen else {
            return Counted { at_ms, endings, ..before.cloned().unwrap_or_default() };
        };
        let totals = |member: &proto::Member| {
            Some((member.id.clone(), member.load.as_ref().and_then(|load| load.totals)?))
        };
        let members = seen.status.members.iter().filter_map(totals).collect();
        let mut counted = Counted { at_ms, seen_ms: at_ms, endings, members, ..Counted::default() };
        for (router, status) in &seen.routers {
            for (cause, count) in &status.migrations {
                counted.migrations.insert((router.clone(), cause.clone()), *count);
            }
        }
        counted
    }

    /// Growth of the members' counts. Of a member that was not there before it is not known, and one that left is not counted.
    fn grown(&self, before: &Counted, count: impl Fn(&Totals) -> u64) -> f64 {
        let past = |id: &String| before.members.get(id).map(&count);
        let grown = |(id, totals)| past(id).map_or(0, |past| count(totals).saturating_sub(past));
        self.members.iter().map(grown).sum::<u64>() as f64
    }

    /// Moves for this cause, all routers together. One that began anew counts from nothing.
    fn moved(&self, before: &Counted, cause: &str) -> f64 {
        let of_cause = self.migrations.iter().filter(|((_, of), _)| of == cause);
        let grown = of_cause.map(|(key, now)| {
            let past = before.migrations.get(key).copied().unwrap_or(*now);
            now.checked_sub(past).unwrap_or(*now)
        });
        grown.sum::<u64>() as f64
    }
}

/// From `running` to `ready`.
fn cluster(before: &Counted, now: &Counted, seen: &Seen) -> Vec<Option<f64>> {
    let status = &seen.status;
    let seconds = now.seen_ms.saturating_sub(before.seen_ms).max(1) as f64 / 1000.0;
    let rate = |count: fn(&Totals) -> u64| now.grown(before, count) / seconds;
    let handoffs = now.grown(before, |totals| totals.handoffs);
    let blocks = |count: fn(&Load) -> u32| {
        status.members.iter().flat_map(|member| &member.load).map(|load| f64::from(count(load))).sum::<f64>()
    };
    let mut values = vec![
        f64::from(status.running),
        status.queue.iter().map(|class| f64::from(class.depth)).sum(),
        rate(|totals| totals.prompt_tokens),
        rate(|totals| totals.completion_tokens),
        rate(|totals| totals.handoff_bytes),
        handoffs / seconds,
        now.grown(before, |totals| totals.handoff_us) / handoffs / 1000.0,
        blocks(|load| load.blocks_total.saturating_sub(load.blocks_free + load.blocks_quarantined)),
        blocks(|load| load.blocks_cached),
        blocks(|load| load.blocks_quarantined),
        blocks(|load| load.blocks_total),
    ];
    values.extend(CAUSES.map(|cause| now.moved(before, cause)));
    values.push(status.conditions.iter().filter(|condition| *condition == "ready").count() as f64);
    // Without a hand-off there is no time of one.
    values.into_iter().map(|value| value.is_finite().then_some(value)).collect()
}

/// To a thousandth: enough to show, short to send.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Member, StatusReply};
    use telemetry::Registry;

    fn seen(handoffs: u64, tokens: u64, drained: u64) -> Seen {
        let totals =
            Totals { handoffs, handoff_us: handoffs * 3000, completion_tokens: tokens, ..Totals::default() };
        let load = Load { blocks_total: 9, blocks_free: 4, totals: Some(totals), ..Load::default() };
        let status = StatusReply {
            members: vec![Member { id: "d".into(), load: Some(load), ..Member::default() }],
            migrations: HashMap::from([("drained".into(), drained)]),
            running: 3,
            ..StatusReply::default()
        };
        Seen { routers: vec![("r".into(), status.clone())], status, silent: Vec::new() }
    }

    fn value(sample: &Sample, field: &str) -> Option<f64> {
        sample[FIELDS.iter().position(|known| *known == field).unwrap()]
    }

    fn ago(history: &mut History, ms: u64) {
        let before = history.before.as_mut().unwrap();
        (before.at_ms, before.seen_ms) = (before.at_ms - ms, before.seen_ms - ms);
    }

    #[test]
    fn what_was_not_seen_for_a_while_is_no_burst() {
        let metrics = Metrics::new(&mut Registry::default());
        let mut history = History::default();
        history.sample(&metrics, None);
        history.sample(&metrics, Some(&seen(10, 1_000_000, 7)));
        let rate = |history: &History| value(history.samples.back().unwrap(), "completion_tokens_rate");
        assert_eq!(rate(&history), Some(0.0), "a member seen for the first time");
        ago(&mut history, 60_000);
        history.sample(&metrics, None);
        assert_eq!(rate(&history), None);
        history.sample(&metrics, Some(&seen(10, 1_006_000, 7)));
        assert!((95.0..=100.0).contains(&rate(&history).unwrap()), "{:?}", rate(&history));
    }

    #[test]
    fn counts_become_rates_and_percentiles_are_of_the_last_moments() {
        let metrics = Metrics::new(&mut Registry::default());
        let mut history = History::default();
        history.sample(&metrics, Some(&seen(10, 100, 7)));
        assert!(history.since(0).is_empty(), "nothing to compare with");
        ago(&mut history, 2000);
        metrics.time_to_first_token.observe(0.25, None);
        metrics.count("/v1/completions", 503);
        history.sample(&metrics, Some(&seen(14, 300, 8)));
        let sample = history.since(0)[0];
        assert!((value(&sample, "ttft_p99").unwrap() - 250.0).abs() < 10.0);
        assert_eq!(value(&sample, "itl_p50"), None);
        assert_eq!((value(&sample, "failed"), value(&sample, "drained")), (Some(1.0), Some(1.0)));
        assert_eq!((value(&sample, "handoff_ms"), value(&sample, "running")), (Some(3.0), Some(3.0)));
        let rate = value(&sample, "completion_tokens_rate").unwrap();
        assert!((50.0..=100.0).contains(&rate), "{rate}");
        assert_eq!((value(&sample, "blocks_used"), value(&sample, "ready")), (Some(5.0), Some(0.0)));
    }

    #[test]
    fn samples_are_bounded_and_a_silence_is_a_gap() {
        let metrics = Metrics::new(&mut Registry::default());
        let mut history = History::default();
        (0..SAMPLES + 2).for_each(|_| history.sample(&metrics, None));
        assert_eq!((history.samples.len(), history.latencies.len()), (SAMPLES, WINDOW));
        let last = history.samples.back().unwrap();
        assert_eq!((value(last, "running"), value(last, "answered")), (None, Some(0.0)));
        assert!(history.since(u64::MAX / 2).is_empty());
    }
}
