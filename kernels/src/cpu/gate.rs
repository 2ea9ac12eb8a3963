//! The router's choice, one token at a time.

use crate::{
    GateRule, GroupScore, Scoring,
    math::{exp_f32, sigmoid},
};

/// Chosen experts of every row and their weights, `[T][top_k]`, best first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    pub top_k: usize,
    pub experts: Vec<u32>,
    pub weights: Vec<f32>,
}

/// Applies `rule` to rows of router logits `[T][experts]`.
pub fn route(logits: &[f32], experts: usize, bias: Option<&[f32]>, rule: &GateRule) -> Routing {
    let mut routing = Routing { top_k: rule.top_k as usize, ..Routing::default() };
    for row in logits.chunks_exact(experts) {
        choose(row, bias, rule, &mut routing);
    }
    routing
}

fn choose(logits: &[f32], bias: Option<&[f32]>, rule: &GateRule, routing: &mut Routing) {
    let scores = score(logits, rule.scoring);
    let mut choice = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
        None => scores.clone(),
    };
    mask_groups(&mut choice, rule);
    let chosen = largest(&choice, rule.top_k as usize);
    let sum: f32 = chosen.iter().map(|expert| scores[*expert]).sum();
    let factor = if rule.normalize { rule.scale / (sum + 1e-20) } else { rule.scale };
    routing.weights.extend(chosen.iter().map(|expert| scores[*expert] * factor));
    routing.experts.extend(chosen.iter().map(|expert| *expert as u32));
}

fn score(logits: &[f32], scoring: Scoring) -> Vec<f32> {
    match scoring {
        Scoring::Sigmoid => logits.iter().map(|z| sigmoid(*z)).collect(),
        Scoring::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers: Vec<f32> = logits.iter().map(|z| exp_f32(z - max)).collect();
            let sum: f32 = powers.iter().sum();
            powers.iter().map(|p| p / sum).collect()
        }
    }
}

/// −∞ for the experts of all groups but the best.
fn mask_groups(choice: &mut [f32], rule: &GateRule) {
    if rule.kept_groups >= rule.groups {
        return;
    }
    let size = choice.len() / rule.groups as usize;
    let scores: Vec<f32> =
        choice.chunks_exact(size).map(|group| group_score(group, rule.group_score)).collect();
    let kept = largest(&scores, rule.kept_groups as usize);
    for (group, values) in choice.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&group) {
            values.fill(f32::NEG_INFINITY);
        }
    }
}

fn group_score(group: &[f32], score: GroupScore) -> f32 {
    let best = largest(group, if score == GroupScore::TopTwo { 2 } else { 1 });
    best.iter().map(|i| group[*i]).sum()
}

/// Indices of the `count` largest values, descending; ties: lower index first.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    order.truncate(count);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: GateRule = GateRule {
        scoring: Scoring::Sigmoid,
        groups: 4,
        kept_groups: 2,
        group_score: GroupScore::TopTwo,
        top_k: 2,
        normalize: true,
        scale: 2.5,
    };

    #[test]
    fn group_limited_choice_with_a_bias_that_does_not_weigh() {
        let z = [0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0];
        let b = [0.10, -0.20, 0.0, -0.60, 0.05, 0.30, -0.10, 0.40];
        let routing = route(&z, 8, Some(&b), &RULE);
        assert_eq!(routing.experts, [6, 5]);
        assert!((routing.weights[0] - 1.710242).abs() < 1e-5 && (routing.weights[1] - 0.789758).abs() < 1e-5);
    }

    #[test]
    fn a_negative_choice_in_a_kept_group_beats_a_masked_expert() {
        let z = [0.0; 4];
        let rule = GateRule { groups: 2, kept_groups: 1, ..RULE };
        assert_eq!(route(&z, 4, Some(&[-0.6, -3.0, -4.0, -4.0]), &rule).experts, [0, 1]);
    }

    #[test]
    fn softmax_without_renormalisation_and_ties_to_the_lower_id() {
        let rule = GateRule {
            scoring: Scoring::Softmax,
            groups: 1,
            kept_groups: 1,
            group_score: GroupScore::Max,
            normalize: false,
            scale: 1.0,
            ..RULE
        };
        let routing = route(&[1.0, 3.0, 3.0, 3.0], 4, None, &rule);
        assert_eq!(routing.experts, [1, 2]);
        assert!((routing.weights[0] - 0.318945).abs() < 1e-5, "{:?}", routing.weights);
        let grouped = GateRule { groups: 2, kept_groups: 1, ..rule };
        assert_eq!(
            route(&[3.0, 0.0, 2.0, 2.5], 4, None, &grouped).experts,
            [0, 1],
            "a V2 group counts by its best"
        );
    }
}
