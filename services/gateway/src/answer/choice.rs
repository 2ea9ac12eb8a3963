//! One choice: tokens in, text out. Pure: detokenising, stop strings, what ended it, and the logprobs that
//! belong to the text given out. The router ends a choice on tokens, this file ends it on text.

use crate::model::Model;
use crate::text::{Detokenizer, StopMatcher};
use openai::StopReason;
use proto::{FinishReason, Token, TokenLogprob};
use std::sync::Arc;

/// How choices of a request end, and what of the end is shown.
#[derive(Debug, Default)]
pub struct Ends {
    pub stop: Vec<String>,
    pub include_stop_str: bool,
    pub stop_token_ids: Vec<u32>,
    /// Empty if they are to be ignored.
    pub eos_ids: Vec<u32>,
    /// Stop strings do not count before this many tokens.
    pub min_tokens: u32,
    pub skip_special: bool,
    /// Keep the tokens beside the text.
    pub logprobs: bool,
    /// The client wants no tokens at all, only its prompt back: the one that must be sampled is dropped.
    pub discard: bool,
}

/// What a choice gained since the last step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    pub text: String,
    /// Tokens up to the end of `text`, and none that belong to text still held back.
    pub tokens: Vec<Scored>,
    /// Tokens sampled.
    pub sampled: u32,
    pub finish: Option<Finish>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Finish {
    /// `stop` or `length`
    pub reason: &'static str,
    pub stop: Option<StopReason>,
}

/// A token with its logprobs.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    pub id: u32,
    /// `None`: the first of a prompt.
    pub logprob: Option<f32>,
    /// Descending.
    pub top: Vec<(u32, f32)>,
    /// Characters of the choice's text before it.
    pub offset: usize,
}

pub struct Choice {
    model: Arc<Model>,
    ends: Arc<Ends>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    sampled: u32,
    /// Characters decoded so far, an echoed prompt's included.
    chars: usize,
    /// Tokens whose text is still held back.
    held: Vec<Scored>,
}

impl Choice {
    /// `echoed`: characters of the prompt that precede the completion in this choice's text.
    pub fn new(model: Arc<Model>, ends: Arc<Ends>, prompt: &[u32], echoed: usize) -> Self {
        let detokenizer = Detokenizer::new(&model.vocabulary, ends.skip_special, prompt);
        let stops = StopMatcher::new(&ends.stop, ends.include_stop_str);
        Choice { model, ends, detokenizer, stops, sampled: 0, chars: echoed, held: Vec::new() }
    }

    /// Tokens taken so far.
    pub fn sampled(&self) -> u32 {
        self.sampled
    }

    /// After a step with a `finish` nothing may follow.
    pub fn token(&mut self, token: &Token) -> Step {
        self.sampled += 1;
        if self.ends.discard {
            return self.discarded();
        }
        if self.ends.logprobs {
            self.held.push(scored(token, self.chars));
        }
        let mut fresh = String::new();
        if !self.is_end(token.id) || self.ends.include_stop_str {
            self.detokenizer.push(&self.model.vocabulary, token.id, &mut fresh);
        }
        let mut step = Step { sampled: 1, ..Step::default() };
        step.finish = self.text(&fresh, &mut step.text);
        self.settle(step)
    }

    /// The router says that the sequence is over.
    pub fn finish(&mut self, reason: FinishReason, stop_token: Option<u32>) -> Step {
        let mut step = Step::default();
        let mut fresh = String::new();
        self.detokenizer.finish(&self.model.vocabulary, &mut fresh);
        let found = self.text(&fresh, &mut step.text);
        if found.is_none() {
            self.stops.finish(&mut step.text);
        }
        step.finish = Some(found.unwrap_or_else(|| self.end(reason, stop_token)));
        self.settle(step)
    }

    /// Feeds text to the stop strings; the choice's end if one is complete.
    fn text(&mut self, fresh: &str, out: &mut String) -> Option<Finish> {
        if self.ends.logprobs {
            self.chars += fresh.chars().count();
        }
        if self.sampled <= self.ends.min_tokens {
            out.push_str(fresh);
            return None;
        }
        let found = self.stops.push(fresh, out)?;
        Some(Finish { reason: "stop", stop: Some(StopReason::Text(self.ends.stop[found.index].clone())) })
    }

    /// Tokens go out with the text they are part of, or with the end.
    fn settle(&mut self, mut step: Step) -> Step {
        if !step.text.is_empty() || step.finish.is_some() {
            step.tokens = std::mem::take(&mut self.held);
        }
        step
    }

    fn is_end(&self, id: u32) -> bool {
        self.ends.eos_ids.contains(&id) || self.ends.stop_token_ids.contains(&id)
    }

    /// The model's own end needs no naming; a stop id that the client gave does.
    fn end(&self, reason: FinishReason, stop_token: Option<u32>) -> Finish {
        let named = stop_token.filter(|id| !self.ends.eos_ids.contains(id)).map(StopReason::Token);
        match reason {
            FinishReason::Length => Finish { reason: "length", stop: None },
            _ => Finish { reason: "stop", stop: named },
        }
    }

    fn discarded(&self) -> Step {
        Step { finish: Some(Finish { reason: "length", stop: None }), ..Step::default() }
    }
}

fn scored(token: &Token, offset: usize) -> Scored {
    let logprob = token.logprob.as_ref().map(|sampled| floor(sampled.logprob));
    Scored { id: token.id, logprob, top: top(&token.top), offset }
}

pub fn top(list: &[TokenLogprob]) -> Vec<(u32, f32)> {
    list.iter().map(|entry| (entry.token, floor(entry.logprob))).collect()
}

/// JSON has no infinity, and NaN is nobody's probability.
pub fn floor(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}
