//! Launcher of `kernels/cuda/gate.cu`.

use super::{
    device::{Address, Args, Device, Grid},
    step::{Extent, StepAddresses},
};
use crate::{Error, GateRule, GroupScore, Scoring};

pub(super) const KERNELS: &[&str] = &["gate_route"];

/// Rows of a thread block.
const ROWS: u32 = 4;
const MAX_EXPERTS: u32 = 384;
/// A lane of a warp for each group, and for each chosen expert.
const LANES: u32 = 32;

/// Applies `rule` to `logits`, f32 `[rows][experts]`, and `bias`, f32 `[experts]`. Fills `chosen`, u32 `[rows][top_k]` best
/// first, and `weights`, f32 alike.
#[allow(clippy::too_many_arguments)]
pub fn route(
    device: &Device,
    at: &StepAddresses,
    extent: &Extent,
    logits: Address,
    experts: u32,
    bias: Option<Address>,
    rule: &GateRule,
    chosen: Address,
    weights: Address,
) -> Result<(), Error> {
    check(experts, rule)?;
    if extent.rows == 0 {
        return Ok(());
    }
    let args = Args::default()
        .ptr(at.counts)
        .ptr(logits)
        .u32(experts)
        .ptr(bias.unwrap_or(0))
        .u32((rule.scoring == Scoring::Softmax).into())
        .u32(rule.groups)
        .u32(rule.kept_groups)
        .u32((rule.group_score == GroupScore::TopTwo).into())
        .u32(rule.top_k)
        .u32(rule.normalize.into())
        .f32(rule.scale)
        .ptr(chosen)
        .ptr(weights);
    device.launch("gate_route", Grid::new([extent.rows.div_ceil(ROWS), 1, 1], 32 * ROWS), args)
}

fn check(experts: u32, rule: &GateRule) -> Result<(), Error> {
    let fail = |what: String| Err(Error::Unsupported(what));
    if experts == 0 || experts > MAX_EXPERTS {
        return fail(format!("{experts} routed experts; the CUDA gate takes 1 to {MAX_EXPERTS}"));
    }
    if rule.top_k > LANES.min(experts) {
        return fail(format!(
            "top_k {} of {experts} experts; the CUDA gate takes {LANES} at most",
            rule.top_k
        ));
    }
    let grouped = rule.kept_groups < rule.groups;
    if grouped && (rule.groups > LANES || !experts.is_multiple_of(rule.groups)) {
        let groups = rule.groups;
        return fail(format!(
            "{experts} experts in {groups} groups; the CUDA gate takes {LANES} equal ones at most"
        ));
    }
    Ok(())
}
