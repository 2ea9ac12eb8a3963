//! What services counted over a window of time: series of samples, scraped here or kept by Prometheus, and what can be asked
//! of them. Counters may begin again at 0 when a process does.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Which service a series is of, as Prometheus calls it.
pub const INSTANCE: &str = "instance";
/// A service that has shown nothing for so many seconds at the end of the window is gone.
const GONE: f64 = 60.0;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    /// Seconds and value, in order of time.
    pub points: Vec<(f64, f64)>,
}

#[derive(Clone, Debug, Default)]
pub struct Window {
    series: Vec<Series>,
    /// Where each is, by name and labels.
    places: HashMap<(String, BTreeMap<String, String>), usize>,
}

impl Window {
    pub fn new(series: Vec<Series>) -> Self {
        let mut window = Window::default();
        series.into_iter().for_each(|series| window.points(series.name, series.labels).extend(series.points));
        window
    }

    /// One more scrape, at `time`, of the service called `instance`.
    pub fn add(&mut self, time: f64, instance: &str, exposition: &str) {
        for (name, mut labels, value) in exposition.lines().filter_map(sample) {
            labels.insert(INSTANCE.to_owned(), instance.to_owned());
            self.points(name, labels).push((time, value));
        }
    }

    /// Of the series so called, which there is from now on.
    fn points(&mut self, name: String, labels: BTreeMap<String, String>) -> &mut Vec<(f64, f64)> {
        let next = self.series.len();
        let place = *self.places.entry((name.clone(), labels.clone())).or_insert(next);
        if place == next {
            self.series.push(Series { name, labels, points: Vec::new() });
        }
        &mut self.series[place].points
    }

    /// From the first sample to the last.
    pub fn seconds(&self) -> f64 {
        let times = || self.series.iter().flat_map(|series| &series.points).map(|(time, _)| *time);
        (times().fold(f64::MIN, f64::max) - times().fold(f64::MAX, f64::min)).max(0.0)
    }

    /// Services that still show a series with these labels at the end.
    pub fn instances(&self, name: &str, labels: &[(&str, &str)]) -> BTreeSet<String> {
        let last = |series: &Series| series.points.last().map_or(f64::MIN, |(time, _)| *time);
        let end = self.series.iter().map(last).fold(f64::MIN, f64::max);
        let alive = self.of(name, labels).filter(|series| last(series) >= end - GONE);
        alive.filter_map(|series| series.labels.get(INSTANCE)).cloned().collect()
    }

    pub fn of<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Series> {
        let has = |series: &Series| {
            labels.iter().all(|(key, value)| series.labels.get(*key).is_some_and(|found| found == value))
        };
        self.series.iter().filter(move |series| series.name == name && has(series))
    }

    /// Of counters, summed.
    pub fn increase(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.of(name, labels).map(|series| series.increase()).sum()
    }

    /// Of gauges: the average over time, summed. `None`: there is no such series.
    pub fn mean(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.of(name, labels).filter_map(Series::mean).reduce(|sum, mean| sum + mean)
    }

    /// Last minus first, of gauges, summed.
    pub fn change(&self, name: &str) -> f64 {
        self.of(name, &[]).filter_map(|series| Some(series.points.last()?.1 - series.points.first()?.1)).sum()
    }

    /// Of a histogram: where the share `q` of its observations lies, straight between bounds, as PromQL has it.
    pub fn quantile(&self, name: &str, q: f64) -> Option<f64> {
        let name = format!("{name}_bucket");
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for series in self.of(&name, &[]) {
            let bound = series.labels.get("le").and_then(|le| le.replace("+Inf", "inf").parse().ok())?;
            match buckets.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, count)) => *count += series.increase(),
                None => buckets.push((bound, series.increase())),
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        quantile(&buckets, q)
    }
}

fn quantile(buckets: &[(f64, f64)], q: f64) -> Option<f64> {
    let all = buckets.last()?.1;
    if all <= 0.0 {
        return None;
    }
    let wanted = q * all;
    let at = buckets.iter().position(|(_, count)| *count >= wanted)?;
    let (low, before) = if at == 0 { (0.0, 0.0) } else { buckets[at - 1] };
    let (high, count) = buckets[at];
    match high.is_finite() && count > before {
        true => Some(low + (high - low) * (wanted - before) / (count - before)),
        false => Some(low),
    }
}

impl Series {
    /// What was counted, also over a restart.
    pub fn increase(&self) -> f64 {
        self.points.windows(2).map(|pair| step(pair[0].1, pair[1].1)).sum()
    }

    fn mean(&self) -> Option<f64> {
        let count = self.points.len();
        (count > 0).then(|| self.points.iter().map(|(_, value)| value).sum::<f64>() / count as f64)
    }
}

/// From one sample of a counter to the next.
pub fn step(before: f64, after: f64) -> f64 {
    if after >= before { after - before } else { after }
}

/// A line of the exposition format: name, labels, value; exemplars are left out.
fn sample(line: &str) -> Option<(String, BTreeMap<String, String>, f64)> {
    if line.starts_with('#') || !line.starts_with("baton_") {
        return None;
    }
    let line = line.split_once(" # {").map_or(line, |(sample, _)| sample);
    let (series, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = series.split_once('{') else {
        return Some((series.to_owned(), BTreeMap::new(), value));
    };
    let labels = labels.strip_suffix('}')?.split("\",").filter_map(|label| label.split_once("=\""));
    let labels = labels.map(|(key, text)| (key.to_owned(), text.trim_end_matches('"').to_owned()));
    Some((name.to_owned(), labels.collect(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expositions_become_series() {
        let mut window = Window::default();
        let at = |n: u32| {
            format!("# TYPE baton_x counter\nbaton_x_total{{kind=\"a\",role=\"b\"}} {n}\nbaton_y {}\n", n * 2)
        };
        window.add(0.0, "one", &at(5));
        window.add(10.0, "one", &at(8));
        window.add(10.0, "two", &at(100));
        assert_eq!(window.increase("baton_x_total", &[("kind", "a")]), 3.0);
        assert_eq!(window.increase("baton_x_total", &[("kind", "c")]), 0.0);
        assert_eq!((window.seconds(), window.mean("baton_y", &[])), (10.0, Some(13.0 + 200.0)));
        assert_eq!(window.instances("baton_y", &[]), BTreeSet::from(["one".to_owned(), "two".to_owned()]));
        assert_eq!((window.mean("baton_z", &[]), window.change("baton_y")), (None, 6.0));
    }

    /// Of many services at once; quadratic, this takes minutes.
    #[test]
    fn samples_are_added_in_a_time_that_grows_with_their_number() {
        let sample = |n: usize| format!("baton_x_bucket{{le=\"{n}\",role=\"decode\"}} 1\n");
        let exposition: String = (0..1_000).map(sample).collect();
        let mut window = Window::default();
        let began = std::time::Instant::now();
        for time in 0..3 {
            (0..100)
                .for_each(|n| window.add(f64::from(time), &format!("http://worker-{n}:7801"), &exposition));
        }
        assert_eq!(
            window.of("baton_x_bucket", &[]).map(|series| series.points.len()).sum::<usize>(),
            300_000
        );
        assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
    }

    #[test]
    fn an_exemplar_is_no_sample() {
        let line = "baton_x_bucket{le=\"0.1\"} 5 # {trace_id=\"0af7\"} 0.05";
        let (name, labels, value) = sample(line).unwrap();
        assert_eq!((name.as_str(), labels["le"].as_str(), value), ("baton_x_bucket", "0.1", 5.0));
    }

    #[test]
    fn a_restart_is_no_loss() {
        let points = vec![(0.0, 10.0), (1.0, 14.0), (2.0, 3.0), (3.0, 5.0)];
        assert_eq!(Series { points, ..Series::default() }.increase(), 4.0 + 3.0 + 2.0);
    }

    #[test]
    fn quantiles_are_straight_between_bounds() {
        let buckets = [(0.1, 10.0), (0.2, 30.0), (f64::INFINITY, 40.0)];
        assert_eq!(quantile(&buckets, 0.5), Some(0.15000000000000002));
        assert_eq!(quantile(&buckets, 0.9), Some(0.2));
        assert_eq!(quantile(&[(0.1, 0.0)], 0.5), None);
    }

    #[test]
    fn a_service_that_fell_silent_is_not_counted() {
        let series = |instance: &str, last: f64| Series {
            name: "baton_kv_blocks".into(),
            labels: BTreeMap::from([(INSTANCE.into(), instance.into())]),
            points: vec![(0.0, 1.0), (last, 1.0)],
        };
        let window = Window::new(vec![series("gone", 100.0), series("here", 600.0)]);
        assert_eq!(window.instances("baton_kv_blocks", &[]), BTreeSet::from(["here".to_owned()]));
    }
}
