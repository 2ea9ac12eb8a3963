//! What the autoscalers of the chart would do now, and which thresholds would have them follow this plan. Signals and rule are
//! those of helm/templates/_signals.tpl and of the HorizontalPodAutoscaler, to which KEDA hands its triggers too.

use super::{
    measured::Measured,
    sizing::{HEADROOM, Target},
};
use serde::Serialize;

/// A HorizontalPodAutoscaler leaves a pool alone within this distance of the threshold.
const TOLERANCE: f64 = 0.1;

/// The chart's defaults, `autoscaling.signals`: a test holds them.
const QUEUE_WAIT: f64 = 1.0;
const WAITING_PREFILL: f64 = 4.0;
const WAITING_DECODE: f64 = 8.0;
const BLOCKS: f64 = HEADROOM;
const ITL: f64 = 0.05;

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Signal {
    pub pool: &'static str,
    /// Its key in the chart's values.
    pub name: &'static str,
    /// `None`: not measured.
    pub value: Option<f64>,
    /// `None`: off by default.
    pub threshold: Option<f64>,
    /// Workers that it asks for.
    pub wanted: Option<u32>,
    /// By the formulae of this plan.
    pub suggested: f64,
}

pub fn signals(measured: &Measured, target: Target) -> Vec<Signal> {
    let (prefill, decode) = (measured.prefill.workers, measured.decode.workers);
    let wait = (target.ttft - measured.uncached_tokens / measured.prefill.speed.max(1.0)).max(0.0);
    let whole = |pool, now, name, value: Option<f64>, threshold, suggested| {
        let wanted = value.map(|value| of_value(now, value, threshold));
        Signal { pool, name, value, threshold: Some(threshold), wanted, suggested }
    };
    let each = |pool, now, name, value: Option<f64>, threshold: Option<f64>, suggested| {
        let wanted = value.zip(threshold).map(|(value, threshold)| of_average(now, value, threshold));
        Signal { pool, name, value, threshold, wanted, suggested }
    };
    vec![
        whole("prefill", prefill, "queueWaitSeconds", measured.queue_wait, QUEUE_WAIT, wait),
        each("prefill", prefill, "waitingRequests", measured.waiting, Some(WAITING_PREFILL), WAITING_PREFILL),
        each(
            "prefill",
            prefill,
            "uncachedTokensPerSecond",
            Some(measured.prefill.tokens),
            None,
            HEADROOM * measured.prefill.speed,
        ),
        whole("decode", decode, "kvBlocksShare", Some(measured.decode.blocks_share), BLOCKS, HEADROOM),
        whole("decode", decode, "interTokenSeconds", measured.itl, ITL, target.itl),
        each("decode", decode, "waitingRequests", measured.waiting, Some(WAITING_DECODE), WAITING_DECODE),
    ]
}

/// `Value`: of the whole pool, which is to bring it down in proportion.
fn of_value(now: u32, value: f64, threshold: f64) -> u32 {
    let ratio = value / threshold;
    if (ratio - 1.0).abs() <= TOLERANCE {
        return now;
    }
    ((f64::from(now) * ratio).ceil() as u32).max(1)
}

/// `AverageValue`: a total, shared out.
fn of_average(now: u32, total: f64, threshold: f64) -> u32 {
    if (total / (threshold * f64::from(now.max(1))) - 1.0).abs() <= TOLERANCE {
        return now;
    }
    ((total / threshold).ceil() as u32).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::measured::{Decode, Prefill};

    #[test]
    fn the_autoscalers_rule_by_hand() {
        assert_eq!(
            [of_value(2, 3.0, 1.0), of_value(4, 0.5, 1.0), of_value(3, 1.05, 1.0), of_value(3, 0.0, 1.0)],
            [6, 2, 3, 1]
        );
        assert_eq!([of_average(1, 20.0, 4.0), of_average(5, 21.0, 4.0), of_average(5, 0.0, 4.0)], [5, 5, 1]);
    }

    #[test]
    fn thresholds_follow_the_plan() {
        let measured = Measured {
            uncached_tokens: 500.0,
            waiting: Some(9.0),
            prefill: Prefill { workers: 1, tokens: 700.0, speed: 1000.0, busy: 0.7 },
            decode: Decode { workers: 2, blocks_share: 0.95, ..Decode::default() },
            ..Measured::default()
        };
        let told = signals(&measured, Target { ttft: 2.0, itl: 0.03, percentile: 0.9 });
        let of =
            |pool: &str, name: &str| told.iter().find(|s| s.pool == pool && s.name == name).unwrap().clone();
        assert_eq!(
            (of("prefill", "queueWaitSeconds").suggested, of("prefill", "queueWaitSeconds").wanted),
            (1.5, None)
        );
        assert_eq!(of("prefill", "uncachedTokensPerSecond").suggested, 800.0);
        assert_eq!(of("prefill", "waitingRequests").wanted, Some(3));
        assert_eq!(
            (of("decode", "kvBlocksShare").wanted, of("decode", "interTokenSeconds").suggested),
            (Some(3), 0.03)
        );
    }

    #[test]
    fn the_charts_defaults_are_these() {
        let values = include_str!("../../../../helm/values.yaml");
        let (_, signals) = values.split_once("\n  signals:\n").expect("the chart has signals");
        let role = |name: &str| {
            let (_, rest) = signals.split_once(&format!("    {name}:\n")).expect("signals of each role");
            rest.lines().take_while(|line| line.starts_with("      ")).collect::<Vec<_>>().join("\n")
        };
        for (name, key, default) in [
            ("prefill", "queueWaitSeconds", QUEUE_WAIT),
            ("prefill", "waitingRequests", WAITING_PREFILL),
            ("prefill", "uncachedTokensPerSecond", 0.0),
            ("decode", "kvBlocksShare", BLOCKS),
            ("decode", "interTokenSeconds", ITL),
            ("decode", "waitingRequests", WAITING_DECODE),
        ] {
            assert!(role(name).contains(&format!("{key}: {default}")), "{name}.{key} is not {default}");
        }
    }
}
