//! The tokens of one request on their way to the client, as a pure record: each position exactly once, in
//! order, wherever it was computed. What has gone out is part of the sequence, so that the sequence is at
//! any time what another worker would have to go on from.

use proto::{FinishReason, Finished, Sequence, Token};

/// A worker sent a token that is not the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a worker sent the token of position {got}, but position {expected} is next: tokens were lost or repeated"
)]
pub struct OutOfOrder {
    pub got: u32,
    pub expected: u32,
}

pub struct Path {
    sequence: Sequence,
    prompt_logprobs: u32,
}

impl Path {
    pub fn new(sequence: Sequence) -> Self {
        Path { sequence, prompt_logprobs: 0 }
    }

    /// Prompt and tokens so far, to place or place again. Prompt logprobs that the client has are not
    /// asked for again once the output has begun.
    pub fn sequence(&self) -> &Sequence {
        &self.sequence
    }

    /// Prompt and tokens so far; bounded by the model's context.
    pub fn len(&self) -> u32 {
        self.sequence.tokens.len() as u32
    }

    /// Whether the client has seen a token.
    pub fn begun(&self) -> bool {
        self.len() > self.sequence.prompt_len
    }

    /// Most tokens of prompt and output.
    pub fn total(&self) -> u32 {
        let max_tokens = self.sequence.stop.as_ref().map_or(0, |stop| stop.max_tokens);
        self.sequence.prompt_len.saturating_add(max_tokens)
    }

    /// Records a token that goes to the client now.
    pub fn token(&mut self, token: &Token) -> Result<(), OutOfOrder> {
        let expected = self.len();
        if token.position != expected {
            return Err(OutOfOrder { got: token.position, expected });
        }
        self.sequence.tokens.push(token.id);
        if let Some(sampling) = &mut self.sequence.sampling {
            sampling.prompt_logprobs = None;
        }
        Ok(())
    }

    /// Whether the client has not seen the logprobs of this prompt position yet; a second attempt repeats them.
    pub fn prompt_logprob(&mut self, position: u32) -> bool {
        let new = position >= self.prompt_logprobs;
        if new {
            self.prompt_logprobs = position + 1;
        }
        new
    }

    /// Whether the client has yet to get logprobs of its prompt, which come before the output.
    pub fn owes_prompt_logprobs(&self) -> bool {
        let asked =
            self.sequence.sampling.as_ref().is_some_and(|sampling| sampling.prompt_logprobs.is_some());
        asked && self.prompt_logprobs.max(1) < self.sequence.prompt_len
    }

    /// How the sequence ended, if its last token ended it: a worker may die after that token and before
    /// saying so.
    pub fn ended(&self) -> Option<Finished> {
        let (stop, last) = (self.sequence.stop.as_ref()?, *self.sequence.tokens.last()?);
        if !self.begun() {
            return None;
        }
        let eos = !stop.ignore_eos && stop.eos_ids.contains(&last);
        if eos || stop.token_ids.contains(&last) {
            return Some(Finished { reason: FinishReason::Stop as i32, stop_token: Some(last) });
        }
        let full = self.len() >= self.total();
        full.then_some(Finished { reason: FinishReason::Length as i32, stop_token: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Sampling, Stop};

    fn path(max_tokens: u32) -> Path {
        let stop = Stop { max_tokens, token_ids: vec![7], eos_ids: vec![2], ..Stop::default() };
        let sampling = Sampling { prompt_logprobs: Some(1), ..Sampling::default() };
        Path::new(Sequence {
            tokens: vec![1, 2, 3],
            prompt_len: 3,
            stop: Some(stop),
            sampling: Some(sampling),
            ..Sequence::default()
        })
    }

    fn token(position: u32, id: u32) -> Token {
        Token { id, position, ..Token::default() }
    }

    #[test]
    fn each_position_once_and_in_order() {
        let mut path = path(10);
        assert_eq!(path.token(&token(4, 5)), Err(OutOfOrder { got: 4, expected: 3 }));
        path.token(&token(3, 5)).unwrap();
        assert_eq!(path.token(&token(3, 5)), Err(OutOfOrder { got: 3, expected: 4 }));
        assert_eq!(path.sequence().tokens, [1, 2, 3, 5]);
        assert_eq!(path.sequence().prompt_len, 3);
        assert_eq!(path.sequence().sampling.as_ref().unwrap().prompt_logprobs, None);
    }

    #[test]
    fn prompt_logprobs_once() {
        let mut path = path(10);
        assert!(path.owes_prompt_logprobs());
        let seen = [1, 2, 1, 2, 3].map(|position| path.prompt_logprob(position));
        assert_eq!(seen, [true, true, false, false, true]);
        assert!(!path.owes_prompt_logprobs());
    }

    #[test]
    fn the_end_is_known_from_the_last_token() {
        let ended = |ids: &[u32], max_tokens| {
            let mut path = path(max_tokens);
            for (position, id) in (3..).zip(ids) {
                path.token(&token(position, *id)).unwrap();
            }
            path.ended().map(|finished| (finished.reason(), finished.stop_token))
        };
        assert_eq!(ended(&[], 2), None, "the prompt's own eos ends nothing");
        assert_eq!(ended(&[5], 2), None);
        assert_eq!(ended(&[5, 6], 2), Some((FinishReason::Length, None)));
        assert_eq!(ended(&[2], 2), Some((FinishReason::Stop, Some(2))));
        assert_eq!(ended(&[5, 7], 2), Some((FinishReason::Stop, Some(7))));
    }
}
