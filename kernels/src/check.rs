//! What every backend checks of a step before it touches anything.

use crate::{Entry, Error, Input, MAX_LOGPROBS, PromptLogprobs, Shape, SlotInit, StepInput};
use std::collections::HashSet;

/// Whether `step` is within what `shape` reserved. What depends on a slot's state is the backend's to check.
pub(crate) fn check(step: &StepInput, shape: &Shape) -> Result<(), Error> {
    check_extent(step, shape)?;
    step.init.iter().try_for_each(|init| check_init(init, shape))?;
    let mut seen = HashSet::new();
    for entry in &step.entries {
        check_entry(entry, shape)?;
        if !seen.insert(entry.slot) {
            return Err(Error::Step(format!("slot {} appears twice", entry.slot)));
        }
    }
    Ok(())
}

fn check_extent(step: &StepInput, shape: &Shape) -> Result<(), Error> {
    let (entries, tokens) = (step.entries.len(), step.tokens());
    if entries == 0 || entries > shape.max_sequences as usize {
        return Err(Error::Step(format!("{entries} entries, expected 1 to {}", shape.max_sequences)));
    }
    if tokens > shape.max_step_tokens as usize {
        return Err(Error::Step(format!("{tokens} tokens, expected at most {}", shape.max_step_tokens)));
    }
    Ok(())
}

fn check_init(init: &SlotInit, shape: &Shape) -> Result<(), Error> {
    if init.slot >= shape.max_sequences {
        return Err(Error::Step(format!("slot {} of {}", init.slot, shape.max_sequences)));
    }
    if init.prompt_len as usize > init.tokens.len() {
        return Err(Error::Step(format!("prompt of {} in {} tokens", init.prompt_len, init.tokens.len())));
    }
    init.sampling.check(shape.vocab).map_err(Error::Step)
}

fn check_entry(entry: &Entry, shape: &Shape) -> Result<(), Error> {
    let fail = |what: String| Err(Error::Step(format!("slot {}: {what}", entry.slot)));
    let end = entry.start as usize + entry.len();
    let needed = end.div_ceil(shape.block_tokens as usize);
    if entry.slot >= shape.max_sequences {
        return fail(format!("there are {} slots", shape.max_sequences));
    }
    if entry.is_empty() {
        return fail("no input".to_string());
    }
    if end > shape.max_context as usize {
        return fail(format!("{end} positions, the model is set up for {}", shape.max_context));
    }
    if entry.block_table.len() < needed {
        return fail(format!("{} blocks, {end} tokens need {needed}", entry.block_table.len()));
    }
    if let Some(block) = entry.block_table.iter().find(|block| **block >= shape.blocks) {
        return fail(format!("block {block} is outside the pool of {}", shape.blocks));
    }
    if let Input::Tokens(tokens) = &entry.input
        && let Some(token) = tokens.iter().find(|token| **token >= shape.vocab)
    {
        return fail(format!("token {token} is outside the vocabulary of {}", shape.vocab));
    }
    match &entry.prompt_logprobs {
        Some(asked) => check_logprobs(asked, entry.len(), shape.vocab).or_else(fail),
        None => Ok(()),
    }
}

fn check_logprobs(asked: &PromptLogprobs, rows: usize, vocab: u32) -> Result<(), String> {
    if asked.top > MAX_LOGPROBS {
        return Err(format!("{} logprobs beside each prompt token, at most {MAX_LOGPROBS}", asked.top));
    }
    if asked.targets.len() != rows {
        return Err(format!("{} targets of prompt logprobs for {rows} tokens", asked.targets.len()));
    }
    match asked.targets.iter().flatten().find(|token| **token >= vocab) {
        Some(token) => {
            Err(format!("target {token} of a prompt logprob is outside the vocabulary of {vocab}"))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_logprobs_that_no_backend_lists_are_refused() {
        let asked = |top, targets: &[u32]| {
            check_logprobs(
                &PromptLogprobs { top, targets: targets.iter().copied().map(Some).collect() },
                2,
                50,
            )
        };
        assert_eq!(asked(20, &[0, 49]), Ok(()));
        for (refused, part) in [
            (asked(21, &[0, 1]), "21 logprobs beside each prompt token, at most 20"),
            (asked(5, &[0]), "1 targets of prompt logprobs for 2 tokens"),
            (asked(5, &[0, 50]), "target 50 of a prompt logprob is outside the vocabulary of 50"),
        ] {
            assert!(refused.clone().unwrap_err().contains(part), "{refused:?}");
        }
    }
}
