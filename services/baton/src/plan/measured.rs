//! What a window says of a cluster: the load that came, and what each pool made of it. Rates are per second, times seconds.

use super::series::{INSTANCE, Window, step};
use anyhow::bail;
use serde::Serialize;
use std::collections::BTreeMap;

/// Steps in a stretch of time from which it is worth a point.
const STEPS: f64 = 5.0;

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measured {
    pub window: f64,
    pub requests: f64,
    /// Of a request.
    pub prompt_tokens: f64,
    pub uncached_tokens: f64,
    pub completion_tokens: f64,
    /// At the percentile of the target, as clients saw them.
    pub ttft: Option<f64>,
    pub itl: Option<f64>,
    /// 95th percentile, and requests waiting: the signals of the autoscalers. Absent if no router was asked.
    pub queue_wait: Option<f64>,
    pub waiting: Option<f64>,
    pub prefill: Prefill,
    pub decode: Decode,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Prefill {
    pub workers: u32,
    /// Prompt tokens computed, by all of them.
    pub tokens: f64,
    /// Of one, while it computes.
    pub speed: f64,
    /// Share of the window in which they computed.
    pub busy: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Decode {
    pub workers: u32,
    /// Tokens decoded, by all of them.
    pub tokens: f64,
    /// Mean batch and mean time of a step, in stretches of the window.
    pub points: Vec<Point>,
    /// Of one worker.
    pub blocks: f64,
    /// Held share of them.
    pub blocks_share: f64,
    /// Held blocks, those of reservations among them, over running sequences.
    pub blocks_per_sequence: Option<f64>,
    pub max_sequences: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Point {
    pub batch: f64,
    pub seconds: f64,
    pub steps: f64,
}

impl Measured {
    /// `percentile`: of the times, 0 to 1.
    pub fn new(window: &Window, percentile: f64, max_sequences: Option<u32>) -> anyhow::Result<Self> {
        let seconds = window.seconds();
        if seconds <= 0.0 {
            bail!(
                "no samples of Baton in the window; give a longer --window, or see that Prometheus scrapes it"
            );
        }
        let requests = arrived(window) / seconds;
        let (prefill, decode) = (prefill(window, seconds), decode(window, seconds, max_sequences));
        if prefill.workers == 0 || decode.workers == 0 {
            bail!(
                "{} prefill and {} decode workers show metrics; both pools are needed (workers of role both are not sized)",
                prefill.workers,
                decode.workers
            );
        }
        if requests <= 0.0 {
            bail!(
                "no request came in {seconds:.0} s: a plan needs load; run `baton bench`, or give a window that has some"
            );
        }
        let ended = ended(window);
        let per_request = |name: &str, otherwise: f64| match ended > 0.0 {
            true => window.increase(name, &[]) / ended,
            false => otherwise / requests,
        };
        let prompt_tokens = per_request("baton_prompt_tokens_total", prefill.tokens);
        let cached = per_request("baton_cached_prompt_tokens_total", 0.0);
        Ok(Measured {
            window: seconds,
            requests,
            prompt_tokens,
            uncached_tokens: (prompt_tokens - cached).max(0.0),
            completion_tokens: per_request("baton_completion_tokens_total", decode.tokens),
            ttft: window.quantile("baton_time_to_first_token_seconds", percentile),
            itl: window.quantile("baton_inter_token_latency_seconds", percentile),
            queue_wait: window.quantile("baton_router_queue_seconds", 0.95),
            waiting: window.mean("baton_router_queue_depth", &[]),
            prefill,
            decode,
        })
    }
}

/// Ended and not refused as wrong.
fn ended(window: &Window) -> f64 {
    let name = "baton_gateway_requests_total";
    let wrong = |code: &String| code.starts_with('4') && code != "499" && code != "429";
    let served = window.of(name, &[]).filter(|series| !series.labels.get("code").is_some_and(wrong));
    served.map(|series| series.increase()).sum()
}

/// What ended and did not come in the window, it shows as fewer in flight.
fn arrived(window: &Window) -> f64 {
    ended(window) + window.change("baton_gateway_in_flight")
}

fn prefill(window: &Window, seconds: f64) -> Prefill {
    let workers = window.instances("baton_kv_blocks", &[("role", "prefill")]);
    let kind = [("kind", "prefill")];
    let (tokens, busy) =
        (window.increase("baton_batch_tokens_sum", &kind), window.increase("baton_step_seconds_sum", &kind));
    Prefill {
        workers: workers.len() as u32,
        tokens: tokens / seconds,
        speed: if busy > 0.0 { tokens / busy } else { 0.0 },
        busy: busy / seconds / workers.len().max(1) as f64,
    }
}

fn decode(window: &Window, seconds: f64, max_sequences: Option<u32>) -> Decode {
    let role = [("role", "decode")];
    let workers = window.instances("baton_kv_blocks", &role);
    let blocks = window.mean("baton_kv_blocks", &role).unwrap_or(0.0);
    let held = window.mean("baton_kv_blocks", &[("role", "decode"), ("state", "held")]).unwrap_or(0.0);
    let running: f64 =
        workers.iter().filter_map(|worker| window.mean("baton_worker_running", &[(INSTANCE, worker)])).sum();
    Decode {
        workers: workers.len() as u32,
        tokens: window.increase("baton_batch_tokens_sum", &[("kind", "decode")]) / seconds,
        points: workers.iter().flat_map(|worker| points(window, worker)).collect(),
        blocks: blocks / workers.len().max(1) as f64,
        blocks_share: if blocks > 0.0 { held / blocks } else { 0.0 },
        blocks_per_sequence: (running > 0.0).then(|| held / running),
        max_sequences,
    }
}

/// Stretches between two samples in which a worker took several steps.
fn points(window: &Window, worker: &str) -> Vec<Point> {
    let labels = [(INSTANCE, worker), ("kind", "decode")];
    let mut by_time: BTreeMap<u64, [f64; 3]> = BTreeMap::new();
    for (at, name) in
        ["baton_batch_tokens_sum", "baton_step_seconds_sum", "baton_step_seconds_count"].iter().enumerate()
    {
        for (time, value) in window.of(name, &labels).flat_map(|series| &series.points) {
            by_time.entry((time * 1e3) as u64).or_default()[at] = *value;
        }
    }
    let samples: Vec<[f64; 3]> = by_time.into_values().collect();
    let stretches = samples.windows(2).map(|pair| [0, 1, 2].map(|at| step(pair[0][at], pair[1][at])));
    let enough = stretches.filter(|[_, _, steps]| *steps >= STEPS);
    enough
        .map(|[tokens, seconds, steps]| Point { batch: tokens / steps, seconds: seconds / steps, steps })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten seconds: 20 requests of 100 prompt tokens, half cached, 30 tokens of answer.
    fn window() -> Window {
        let mut window = Window::default();
        for turn in 0..=10 {
            let n = f64::from(turn);
            let gateway = format!(
                "baton_gateway_requests_total{{endpoint=\"/v1/completions\",code=\"200\"}} {}\n\
                 baton_gateway_requests_total{{endpoint=\"/v1/completions\",code=\"400\"}} {}\nbaton_gateway_in_flight 5\n\
                 baton_prompt_tokens_total {}\nbaton_cached_prompt_tokens_total {}\nbaton_completion_tokens_total {}\n",
                2.0 * n,
                7.0 * n,
                200.0 * n,
                100.0 * n,
                60.0 * n
            );
            let prefill = format!(
                "baton_kv_blocks{{role=\"prefill\",state=\"free\"}} 10\nbaton_batch_tokens_sum{{kind=\"prefill\"}} {}\n\
                 baton_step_seconds_sum{{kind=\"prefill\"}} {}\n",
                100.0 * n,
                0.5 * n
            );
            let decode = format!(
                "baton_kv_blocks{{role=\"decode\",state=\"held\"}} 30\nbaton_kv_blocks{{role=\"decode\",state=\"free\"}} 70\n\
                 baton_worker_running 6\nbaton_batch_tokens_sum{{kind=\"decode\"}} {}\n\
                 baton_step_seconds_sum{{kind=\"decode\"}} {}\nbaton_step_seconds_count{{kind=\"decode\"}} {}\n",
                58.0 * n,
                0.8 * n,
                20.0 * n
            );
            for (name, text) in [("g", gateway), ("p", prefill), ("d", decode)] {
                window.add(n, name, &text);
            }
        }
        window
    }

    #[test]
    fn a_window_is_read() {
        let measured = Measured::new(&window(), 0.9, Some(8)).unwrap();
        assert_eq!((measured.requests, measured.prompt_tokens, measured.uncached_tokens), (2.0, 100.0, 50.0));
        assert_eq!(measured.completion_tokens, 30.0);
        assert_eq!(measured.prefill, Prefill { workers: 1, tokens: 100.0, speed: 200.0, busy: 0.5 });
        let decode = &measured.decode;
        assert_eq!(
            (decode.workers, decode.tokens, decode.blocks, decode.blocks_share),
            (1, 58.0, 100.0, 0.3)
        );
        assert_eq!((decode.blocks_per_sequence, decode.points.len()), (Some(5.0), 10));
        assert!(
            (decode.points[3].batch - 2.9).abs() < 1e-9 && (decode.points[3].seconds - 0.04).abs() < 1e-9
        );
    }

    #[test]
    fn nothing_is_planned_without_load_or_pools() {
        let why = |window: &Window| Measured::new(window, 0.9, None).unwrap_err().to_string();
        assert!(why(&Window::default()).contains("no samples"));
        let mut idle = Window::default();
        idle.add(0.0, "p", "baton_kv_blocks{role=\"prefill\",state=\"free\"} 1\n");
        idle.add(9.0, "p", "baton_kv_blocks{role=\"prefill\",state=\"free\"} 1\n");
        assert!(why(&idle).contains("0 decode workers"));
        idle.add(9.0, "d", "baton_kv_blocks{role=\"decode\",state=\"free\"} 1\n");
        assert!(why(&idle).contains("needs load"));
    }
}
