//! A plan as text: what was measured, what that asks for and why, and what the autoscalers would do.

use super::{
    measured::Measured,
    scaling::Signal,
    sizing::{Bound, Plan, Pool, Target},
};
use serde::Serialize;
use std::fmt;

#[derive(Serialize)]
pub struct Report {
    pub target: Target,
    pub measured: Measured,
    pub plan: Plan,
    pub autoscaling: Vec<Signal>,
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { target, measured, plan, autoscaling } = self;
        let percent = target.percentile * 100.0;
        writeln!(
            out,
            "Wanted: first token within {:.0} ms, {:.1} ms between tokens (p{percent:.0})\n",
            target.ttft * 1e3,
            target.itl * 1e3
        )?;
        load(out, measured, percent)?;
        pool(out, "prefill", &plan.prefill)?;
        pool(out, "decode", &plan.decode)?;
        for caveat in &plan.caveats {
            writeln!(out, "note: {caveat}")?;
        }
        writeln!(out, "\nThe chart's autoscalers, by their signals (the largest number counts):\n")?;
        writeln!(
            out,
            "  {:<8} {:<24} {:>10} {:>10} {:>7} {:>10}",
            "POOL", "SIGNAL", "NOW", "THRESHOLD", "WANTED", "SUGGESTED"
        )?;
        autoscaling.iter().try_for_each(|signal| line(out, signal))
    }
}

fn load(out: &mut fmt::Formatter<'_>, measured: &Measured, percent: f64) -> fmt::Result {
    let Measured { window, requests, prompt_tokens, uncached_tokens, completion_tokens, .. } = measured;
    writeln!(out, "Measured over {window:.0} s: {requests:.2} requests/s")?;
    writeln!(
        out,
        "  a request          {prompt_tokens:.0} prompt tokens ({uncached_tokens:.0} uncached), {completion_tokens:.0} of answer"
    )?;
    let times = [("first token", measured.ttft), ("between tokens", measured.itl)];
    for (name, time) in times.iter().filter_map(|(name, time)| Some((name, (*time)?))) {
        writeln!(out, "  {:<18} {:.1} ms", format!("{name} p{percent:.0}"), time * 1e3)?;
    }
    let (prefill, decode) = (&measured.prefill, &measured.decode);
    writeln!(
        out,
        "  prefill            {:.0} tokens/s, {:.0} tokens/s a worker while it computes, {:.0} % busy",
        prefill.tokens,
        prefill.speed,
        prefill.busy * 100.0
    )?;
    let blocks = decode
        .blocks_per_sequence
        .map_or(String::new(), |each| format!(", {each:.1} for each sequence that runs"));
    writeln!(
        out,
        "  decode             {:.0} tokens/s, {:.0} % of KV blocks held{blocks}\n",
        decode.tokens,
        decode.blocks_share * 100.0
    )
}

fn pool(out: &mut fmt::Formatter<'_>, name: &str, pool: &Pool) -> fmt::Result {
    let Pool { now, wanted, binding, bounds } = pool;
    let plural = if *wanted == 1 { "" } else { "s" };
    writeln!(out, "{name}: {wanted} worker{plural} ({now} now), bound by {binding}")?;
    for Bound { name, wanted, why } in bounds {
        writeln!(out, "  {name:<10} {wanted:>4}  {why}")?;
    }
    writeln!(out)
}

fn line(out: &mut fmt::Formatter<'_>, signal: &Signal) -> fmt::Result {
    let Signal { pool, name, value, threshold, wanted, suggested } = signal;
    let number = |value: &Option<f64>, absent: &str| value.map_or(absent.to_owned(), short);
    let wanted = wanted.map_or("-".to_owned(), |wanted| wanted.to_string());
    let (value, threshold, suggested) = (number(value, "?"), number(threshold, "off"), short(*suggested));
    writeln!(out, "  {pool:<8} {name:<24} {value:>10} {threshold:>10} {wanted:>7} {suggested:>10}")
}

fn short(value: f64) -> String {
    if value >= 10.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}
