//! How many workers a load needs: a pure function of what was measured and what is wanted. Each bound gives a number and its
//! reason; the largest one binds. ARCHITECTURE.md, "How many workers", has the formulae.

use super::{
    curve::{Curve, Operating},
    measured::Measured,
    queueing::wait,
};
use serde::Serialize;

/// Share of the time, of tokens a second and of KV blocks that a pool is planned to use: above it queues grow steeply and a
/// lost worker is felt at once. The autoscalers' `kvBlocksShare` is the same number.
pub const HEADROOM: f64 = 0.8;
/// Tokens asked for over tokens decoded, up to which all of them count as served: both are measured.
const SERVED: f64 = 1.25;
/// More is not searched for.
const MOST: u32 = 10_000;

/// In seconds; `percentile` of both, 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Target {
    pub ttft: f64,
    pub itl: f64,
    pub percentile: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub prefill: Pool,
    pub decode: Pool,
    /// What the numbers rest on, where that is less than measured.
    pub caveats: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pool {
    pub now: u32,
    pub wanted: u32,
    /// Name of the bound that binds.
    pub binding: &'static str,
    pub bounds: Vec<Bound>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bound {
    pub name: &'static str,
    pub wanted: u32,
    pub why: String,
}

pub fn plan(measured: &Measured, target: Target) -> Plan {
    let mut caveats = Vec::new();
    let prefill = prefill(measured, target, &mut caveats);
    let decode = decode(measured, target, &mut caveats);
    Plan { prefill, decode, caveats }
}

fn prefill(measured: &Measured, target: Target, caveats: &mut Vec<String>) -> Pool {
    let pool = &measured.prefill;
    if pool.speed <= 0.0 {
        caveats.push("no prompt was computed in the window: prefill is left as it is".to_owned());
        return Pool::of(pool.workers, vec![Bound::new("none", pool.workers, "nothing was measured".into())]);
    }
    // What was computed, or what came, if the workers could not keep up.
    let tokens = pool.tokens.max(measured.requests * measured.uncached_tokens);
    let load = tokens / pool.speed;
    let rate = Bound::new(
        "rate",
        workers(load / HEADROOM),
        format!(
            "{tokens:.0} uncached prompt tokens/s at {:.0} tokens/s a worker, {HEADROOM} of its time",
            pool.speed
        ),
    );
    let ttft = time_to_first_token(measured, target, load, rate.wanted, caveats);
    Pool::of(pool.workers, vec![rate, ttft])
}

/// TTFT is the wait for a prefill worker, and one prompt's computing.
fn time_to_first_token(
    measured: &Measured,
    target: Target,
    load: f64,
    least: u32,
    caveats: &mut Vec<String>,
) -> Bound {
    let service = measured.uncached_tokens.max(1.0) / measured.prefill.speed;
    let patience = target.ttft - service;
    if patience < 0.0 {
        let why = format!("one prompt alone takes {:.0} ms", service * 1e3);
        caveats.push(format!(
            "no number of prefill workers reaches a TTFT of {:.0} ms: {why}; faster workers or shorter prompts do",
            target.ttft * 1e3
        ));
        return Bound::new("ttft", least, why);
    }
    let enough = |servers: &u32| wait(*servers, load, service, target.percentile) <= patience;
    let wanted = (workers(load)..=MOST).find(enough).unwrap_or(MOST);
    let why = format!(
        "{:.0} ms for a prompt of {:.0} tokens leave {:.0} ms to wait (p{:.0}, M/M/c at a load of {load:.2})",
        service * 1e3,
        measured.uncached_tokens,
        patience * 1e3,
        target.percentile * 100.0
    );
    Bound::new("ttft", wanted, why)
}

fn decode(measured: &Measured, target: Target, caveats: &mut Vec<String>) -> Pool {
    let pool = &measured.decode;
    let Some(curve) = Curve::fit(&pool.points) else {
        caveats.push("nothing was decoded in the window: decode is left as it is".to_owned());
        return Pool::of(pool.workers, vec![Bound::new("none", pool.workers, "nothing was measured".into())]);
    };
    let spread = latency_over_step(measured, &curve);
    let at = curve.operating(target.itl / spread);
    // The first token of a request is prefill's.
    let tokens = pool.tokens.max(measured.requests * (measured.completion_tokens - 1.0).max(0.0));
    let each = at.batch / at.seconds;
    let computed = workers(tokens / (each * HEADROOM));
    // Of one worker there cannot be fewer.
    caveats.extend(doubts(&curve, &at, target).filter(|_| computed > 1 || !at.at_edge));
    // Where no larger batch was seen, the workers there are have proved at least that they are enough.
    let proved = at.at_edge && tokens <= SERVED * pool.tokens;
    let mut bounds = vec![Bound::new(
        "itl",
        if proved { computed.min(pool.workers) } else { computed },
        format!(
            "{tokens:.0} tokens/s at {each:.0} tokens/s a worker (batch {:.1}, {:.1} ms a step, which p{:.0} of clients see as {:.1} ms), \
             {HEADROOM} of it",
            at.batch,
            at.seconds * 1e3,
            target.percentile * 100.0,
            at.seconds * spread * 1e3
        ),
    )];
    bounds.extend(blocks(measured, tokens));
    bounds.extend(pool.max_sequences.map(|most| {
        let batch = f64::from(most) * HEADROOM;
        let why = format!("{most} sequences a worker (max_sequences), {HEADROOM} of them");
        Bound::new("sequences", workers(tokens / curve.rate(batch)), why)
    }));
    Pool::of(pool.workers, bounds)
}

/// How much longer than a step the time between tokens is, at the percentile.
fn latency_over_step(measured: &Measured, curve: &Curve) -> f64 {
    let steps: f64 = measured.decode.points.iter().map(|point| point.steps).sum();
    let batch = measured.decode.points.iter().map(|point| point.batch * point.steps).sum::<f64>() / steps;
    measured.itl.map_or(1.0, |itl| (itl / curve.at(batch)).max(1.0))
}

fn doubts(curve: &Curve, at: &Operating, target: Target) -> Option<String> {
    let range = format!("batches of {:.1} to {:.1} were observed", curve.from, curve.to);
    if at.unreachable {
        return Some(format!(
            "no number of decode workers reaches {:.1} ms between tokens: a batch of one takes longer ({range})",
            target.itl * 1e3
        ));
    }
    if at.at_edge {
        return Some(format!(
            "larger batches may be fast enough too, and fewer decode workers do: {range}; plan under more load"
        ));
    }
    at.extrapolated.then(|| format!("a batch of {:.1} is extrapolated: {range}", at.batch))
}

/// Blocks held grow with the tokens decoded, those of reservations among them.
fn blocks(measured: &Measured, tokens: f64) -> Option<Bound> {
    let pool = &measured.decode;
    if pool.tokens <= 0.0 || pool.blocks_share <= 0.0 {
        return None;
    }
    let held = pool.blocks_share * pool.blocks * f64::from(pool.workers) * tokens / pool.tokens;
    let why = format!("{held:.0} blocks held at this load, {:.0} a worker, {HEADROOM} of them", pool.blocks);
    Some(Bound::new("kv_blocks", workers(held / (pool.blocks * HEADROOM)), why))
}

/// At least one: an empty pool serves nobody.
fn workers(load: f64) -> u32 {
    // What is a whole number but for rounding is that number.
    ((load - 1e-9).ceil().max(1.0) as u32).min(MOST)
}

impl Bound {
    fn new(name: &'static str, wanted: u32, why: String) -> Self {
        Bound { name, wanted, why }
    }
}

impl Pool {
    /// Of equal bounds the first binds.
    fn of(now: u32, bounds: Vec<Bound>) -> Self {
        let largest = bounds.iter().rev().max_by_key(|bound| bound.wanted).expect("a pool has bounds");
        Pool { now, wanted: largest.wanted, binding: largest.name, bounds: bounds.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::measured::{Decode, Point, Prefill};

    const TARGET: Target = Target { ttft: 1.0, itl: 0.05, percentile: 0.9 };

    /// 4 requests a second of 1000 prompt tokens and 101 of answer; a prefill worker makes 5000 tokens/s, a decode worker a
    /// step of 10 + b ms.
    fn measured() -> Measured {
        let point = |batch: f64| Point { batch, seconds: 0.010 + 0.001 * batch, steps: 100.0 };
        Measured {
            requests: 4.0,
            uncached_tokens: 1000.0,
            completion_tokens: 101.0,
            prefill: Prefill { workers: 1, tokens: 4000.0, speed: 5000.0, busy: 0.8 },
            decode: Decode {
                workers: 1,
                tokens: 400.0,
                points: vec![point(4.0), point(40.0)],
                blocks: 1000.0,
                blocks_share: 0.4,
                max_sequences: Some(64),
                ..Decode::default()
            },
            ..Measured::default()
        }
    }

    fn bound<'a>(pool: &'a Pool, name: &str) -> &'a Bound {
        pool.bounds.iter().find(|bound| bound.name == name).unwrap()
    }

    #[test]
    fn by_hand() {
        let plan = plan(&measured(), TARGET);
        // 4000 / 5000 = 0.8 of a worker: exactly the headroom of one. But of those that wait, p90 is
        // 0.2 / 0.2 · ln(0.8 / 0.1) = 2.08 s, and 0.8 s are left; of two: C = 0.229, 0.2 / 1.2 · ln(2.29) = 0.14 s.
        assert_eq!((bound(&plan.prefill, "rate").wanted, bound(&plan.prefill, "ttft").wanted), (1, 2));
        assert_eq!((plan.prefill.wanted, plan.prefill.binding), (2, "ttft"));
        // 50 ms allow a batch of 40: 800 tokens/s, 640 with headroom; 400 need one. 400 blocks are held, of 800.
        assert_eq!((plan.decode.wanted, bound(&plan.decode, "kv_blocks").wanted), (1, 1));
        assert_eq!((plan.decode.binding, plan.caveats.len()), ("itl", 0));
    }

    #[test]
    fn each_bound_can_bind() {
        let mut tight = Measured { requests: 8.0, ..measured() };
        tight.decode.blocks_share = 0.95;
        // Twice the tokens hold 1900 blocks, of 800.
        assert_eq!(
            (plan(&tight, TARGET).decode.wanted, plan(&tight, TARGET).decode.binding),
            (3, "kv_blocks")
        );
        let mut few = measured();
        few.decode.max_sequences = Some(1);
        // 0.8 sequences: 74 tokens/s.
        assert_eq!((plan(&few, TARGET).decode.wanted, plan(&few, TARGET).decode.binding), (6, "sequences"));
        let fast = plan(&measured(), Target { itl: 0.015, ..TARGET });
        // A batch of 5 in 15 ms: 333 tokens/s, 267 with headroom.
        assert_eq!((fast.decode.wanted, fast.decode.binding), (2, "itl"));
        let patient = plan(&Measured { requests: 8.0, ..measured() }, Target { ttft: 100.0, ..TARGET });
        assert_eq!((patient.prefill.wanted, patient.prefill.binding), (2, "rate"));
    }

    #[test]
    fn more_load_never_wants_fewer() {
        let mut before = (0, 0);
        for requests in 1..200 {
            let plan = plan(&Measured { requests: f64::from(requests), ..measured() }, TARGET);
            let now = (plan.prefill.wanted, plan.decode.wanted);
            assert!(now.0 >= before.0 && now.1 >= before.1, "{requests}: {before:?} -> {now:?}");
            before = now;
        }
        assert!(before.0 > 40 && before.1 > 20, "{before:?}");
    }

    #[test]
    fn stricter_targets_never_want_fewer() {
        let mut before = (0, 0);
        for ms in (20..400).rev() {
            let target = Target { ttft: f64::from(ms + 300) / 1e3, itl: f64::from(ms) / 1e3, ..TARGET };
            let plan = plan(&Measured { requests: 20.0, ..measured() }, target);
            let now = (plan.prefill.wanted, plan.decode.wanted);
            assert!(now.0 >= before.0 && now.1 >= before.1, "{ms}: {before:?} -> {now:?}");
            before = now;
        }
    }

    #[test]
    fn what_cannot_be_reached_is_said() {
        let plan = plan(&measured(), Target { ttft: 0.1, itl: 0.005, percentile: 0.9 });
        assert!(
            plan.caveats.len() == 2 && plan.caveats.iter().all(|c| c.contains("no number of")),
            "{plan:#?}"
        );
        let far = super::plan(&measured(), Target { itl: 0.07, ..TARGET });
        assert!(far.caveats.len() == 1 && far.caveats[0].contains("extrapolated"), "{far:#?}");
        let edge = super::plan(&Measured { requests: 40.0, ..measured() }, Target { itl: 1.0, ..TARGET });
        assert!(edge.caveats.len() == 1 && edge.caveats[0].contains("plan under more load"), "{edge:#?}");
    }

    #[test]
    fn a_light_load_that_is_served_asks_for_no_more() {
        // One sequence now and then: 83 % of what a batch of one makes, in a tenth of the time that it may take.
        let mut light = measured();
        let one = Point { batch: 1.0, seconds: 0.0027, steps: 100.0 };
        (light.requests, light.decode.tokens, light.decode.points) = (3.1, 310.0, vec![one; 3]);
        assert_eq!(plan(&light, TARGET).decode.wanted, 1);
        // More than is decoded is not proved.
        light.requests = 6.2;
        assert_eq!(plan(&light, TARGET).decode.wanted, 3);
    }
}
