//! Between messages and the engine's types. Whatever arrives is checked here, and a refusal names the field.

use engine::{Computed, Event, Finish, Refused, SequenceSpec};
use kernels::{Logprobs, SampledToken, Sampling};
use proto::{Error, ErrorCode, FinishReason, PartName, Place, latency::Meter};

/// What a sequence must keep to on this worker.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub vocab_size: u32,
    /// Tokens of prompt and output together.
    pub max_context: u32,
}

/// Of penalties and biases: together they keep every logit finite, since of logits that are not numbers no token
/// can be chosen, and a device that cannot choose stops.
const LARGEST: f32 = 1e9;

fn invalid(field: &str, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorCode::InvalidRequest, format!("`{field}` {what}"))
}

impl Bounds {
    /// `forced`: the token after `sequence.tokens`, already seen by the client.
    pub fn spec(
        self,
        sequence: Option<proto::Sequence>,
        forced: Option<proto::Token>,
    ) -> Result<SequenceSpec, Error> {
        let sequence = sequence.ok_or_else(|| invalid("sequence", "is missing"))?;
        let prompt_len = self.check_tokens(&sequence)?;
        let stop = sequence.stop.ok_or_else(|| invalid("sequence.stop", "is missing"))?;
        self.check_stop(&stop, sequence.tokens.len() - prompt_len)?;
        let sampling = sequence.sampling.ok_or_else(|| invalid("sequence.sampling", "is missing"))?;
        Ok(SequenceSpec {
            request_id: sequence.request_id,
            sampling: self.sampling(sampling, &stop)?,
            prompt_len,
            max_tokens: stop.max_tokens as usize,
            stop_ids: stop_ids(&stop),
            priority: sequence.priority,
            forced: self.forced(forced, sequence.tokens.len())?,
            tokens: sequence.tokens,
        })
    }

    fn id(self, field: &str, id: u32) -> Result<u32, Error> {
        if id < self.vocab_size {
            return Ok(id);
        }
        Err(invalid(field, format_args!("holds id {id}; the vocabulary has {}", self.vocab_size)))
    }

    fn check_tokens(self, sequence: &proto::Sequence) -> Result<usize, Error> {
        let (tokens, prompt_len) = (sequence.tokens.len(), sequence.prompt_len as usize);
        if tokens == 0 {
            return Err(invalid("sequence.tokens", "is empty"));
        }
        if !(1..=tokens).contains(&prompt_len) {
            return Err(invalid("sequence.prompt_len", format_args!("is {prompt_len} of {tokens} tokens")));
        }
        for &id in &sequence.tokens {
            self.id("sequence.tokens", id)?;
        }
        if tokens < self.max_context as usize {
            return Ok(prompt_len);
        }
        let message =
            format!("{tokens} tokens leave no room for output in a context of {}", self.max_context);
        Err(Error::new(ErrorCode::ContextLength, message))
    }

    fn check_stop(self, stop: &proto::Stop, generated: usize) -> Result<(), Error> {
        if stop.max_tokens as usize <= generated {
            let what = format_args!("is {} and {generated} are generated already", stop.max_tokens);
            return Err(invalid("sequence.stop.max_tokens", what));
        }
        if stop.min_tokens > stop.max_tokens {
            let what = format_args!("is {}, above max_tokens {}", stop.min_tokens, stop.max_tokens);
            return Err(invalid("sequence.stop.min_tokens", what));
        }
        for &id in stop.token_ids.iter().chain(&stop.eos_ids) {
            self.id("sequence.stop", id)?;
        }
        Ok(())
    }

    fn forced(self, forced: Option<proto::Token>, position: usize) -> Result<Option<u32>, Error> {
        let Some(token) = forced else { return Ok(None) };
        if token.position as usize != position {
            let what = format_args!("has position {}; the sequence has {position} tokens", token.position);
            return Err(invalid("forced", what));
        }
        self.id("forced", token.id).map(Some)
    }

    fn sampling(self, sampling: proto::Sampling, stop: &proto::Stop) -> Result<Sampling, Error> {
        check_range("temperature", sampling.temperature, 0.0, f32::MAX)?;
        check_range("top_p", sampling.top_p, f32::MIN_POSITIVE, f32::MAX)?;
        check_range("min_p", sampling.min_p, 0.0, 1.0)?;
        check_range("presence_penalty", sampling.presence_penalty, -LARGEST, LARGEST)?;
        check_range("frequency_penalty", sampling.frequency_penalty, -LARGEST, LARGEST)?;
        check_range("repetition_penalty", sampling.repetition_penalty, LARGEST.recip(), LARGEST)?;
        let sampling = Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k.max(0) as u32,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            logit_bias: self.logit_bias(sampling.logit_bias)?,
            seed: sampling.seed,
            choice: sampling.choice,
            logprobs: sampling.logprobs,
            prompt_logprobs: sampling.prompt_logprobs,
            min_tokens: stop.min_tokens,
            suppress: suppressed(stop),
        };
        // What a backend refuses inside a step ends the worker.
        match sampling.check(self.vocab_size) {
            Ok(()) => Ok(sampling),
            Err(what) => {
                Err(invalid("sequence.sampling", format_args!("asks for what cannot be had: {what}")))
            }
        }
    }

    fn logit_bias(self, bias: impl IntoIterator<Item = (u32, f32)>) -> Result<Vec<(u32, f32)>, Error> {
        let mut bias: Vec<_> = bias.into_iter().collect();
        for &(id, addend) in &bias {
            self.id("sequence.sampling.logit_bias", id)?;
            check_range("logit_bias", addend, -LARGEST, LARGEST)?;
        }
        bias.sort_unstable_by_key(|(id, _)| *id);
        Ok(bias)
    }
}

fn check_range(field: &str, value: f32, low: f32, high: f32) -> Result<(), Error> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(invalid(
        &format!("sequence.sampling.{field}"),
        format_args!("is {value}, outside {low:e} to {high:e}"),
    ))
}

/// Ids that would end the sequence before `min_tokens`.
fn suppressed(stop: &proto::Stop) -> Vec<u32> {
    if stop.min_tokens == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = stop.eos_ids.iter().chain(&stop.token_ids).copied().collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn stop_ids(stop: &proto::Stop) -> Vec<u32> {
    let eos = if stop.ignore_eos { &[][..] } else { &stop.eos_ids };
    eos.iter().chain(&stop.token_ids).copied().collect()
}

pub fn token(position: u32, token: SampledToken) -> proto::Token {
    let (logprob, top) = match token.logprobs {
        Some(logprobs) => (Some(one(logprobs.token)), logprobs.top.into_iter().map(one).collect()),
        None => (None, Vec::new()),
    };
    proto::Token { id: token.id, position, logprob, top }
}

/// A first token was computed here, from the prompt.
pub fn prefilled(meter: &mut Meter, computed: Option<Computed>) {
    let Some(computed) = computed else { return };
    meter.lap_until(computed.began, PartName::PrefillWait, Place::Prefill);
    meter.lap_until(computed.ended, PartName::Prefill, Place::Prefill);
}

/// A token after the first was computed here.
pub fn decoded(meter: &mut Meter, computed: Option<Computed>) {
    let Some(computed) = computed else { return };
    meter.lap_until(computed.began, PartName::DecodeWait, Place::Decode);
    meter.lap_until(computed.ended, PartName::Decode, Place::Decode);
}

pub fn prompt_logprob(position: u32, logprobs: Logprobs) -> proto::PromptLogprob {
    let top = logprobs.top.into_iter().map(one).collect();
    proto::PromptLogprob { position, logprob: Some(one(logprobs.token)), top }
}

fn one(logprob: kernels::TokenLogprob) -> proto::TokenLogprob {
    proto::TokenLogprob { token: logprob.token, logprob: logprob.logprob, rank: logprob.rank }
}

/// Reason, and the token that was the reason.
pub fn finish(finish: Finish) -> (FinishReason, Option<u32>) {
    match finish {
        Finish::Stop(token) => (FinishReason::Stop, Some(token)),
        Finish::Length => (FinishReason::Length, None),
    }
}

/// Whether `token` after the tokens of `spec` ends the sequence: the engine's own rule, known before it says so.
pub fn ends(spec: &SequenceSpec, token: u32, max_context: u32) -> Option<Finish> {
    let end = spec.prompt_len.saturating_add(spec.max_tokens).min(max_context as usize);
    if spec.stop_ids.contains(&token) {
        return Some(Finish::Stop(token));
    }
    (spec.tokens.len() + 1 >= end).then_some(Finish::Length)
}

pub fn refused(refused: Refused) -> Error {
    let code = match &refused {
        Refused::TooLong { .. } => ErrorCode::ContextLength,
        Refused::Invalid(_) => ErrorCode::InvalidRequest,
        Refused::Full(_) => ErrorCode::NoCapacity,
        Refused::Stopped(_) => ErrorCode::WorkerLost,
    };
    Error::new(code, refused.to_string())
}

/// An event where it cannot be: the engine and this worker disagree about its contract.
pub fn unexpected(event: &Event) -> Error {
    Error::new(ErrorCode::Internal, format!("the engine said {event:?} out of place"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { vocab_size: 100, max_context: 8 };

    fn sequence() -> proto::Sequence {
        proto::Sequence {
            tokens: vec![1, 2, 3],
            prompt_len: 2,
            sampling: Some(proto::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
            stop: Some(proto::Stop {
                max_tokens: 4,
                eos_ids: vec![9],
                token_ids: vec![7],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn refusal(change: impl FnOnce(&mut proto::Sequence)) -> (ErrorCode, String) {
        let mut sequence = sequence();
        change(&mut sequence);
        let error = BOUNDS.spec(Some(sequence), None).expect_err("must be refused");
        (error.code(), error.message)
    }

    #[test]
    fn a_sequence_becomes_a_specification() {
        let mut message = sequence();
        message.sampling.as_mut().unwrap().logit_bias = [(5, 1.0), (2, -1.0)].into();
        let forced = proto::Token { id: 4, position: 3, ..Default::default() };
        let spec = BOUNDS.spec(Some(message), Some(forced)).unwrap();
        assert_eq!((spec.prompt_len, spec.max_tokens, spec.forced), (2, 4, Some(4)));
        assert_eq!(spec.stop_ids, [9, 7]);
        assert_eq!(spec.sampling.logit_bias, [(2, -1.0), (5, 1.0)]);
        let mut message = sequence();
        message.stop.as_mut().unwrap().ignore_eos = true;
        let spec = BOUNDS.spec(Some(message), None).unwrap();
        assert_eq!((spec.stop_ids, spec.sampling.suppress), (vec![7], vec![]));
        let mut message = sequence();
        let stop = message.stop.as_mut().unwrap();
        (stop.min_tokens, stop.token_ids) = (2, vec![9, 7, 7]);
        assert_eq!(BOUNDS.spec(Some(message), None).unwrap().sampling.suppress, [7, 9]);
    }

    #[test]
    fn a_first_token_may_be_the_last() {
        let spec = BOUNDS.spec(Some(sequence()), None).unwrap();
        assert_eq!(ends(&spec, 7, 8), Some(Finish::Stop(7)));
        assert_eq!(ends(&spec, 1, 8), None);
        assert_eq!(ends(&spec, 1, 4), Some(Finish::Length));
        assert_eq!(ends(&SequenceSpec { max_tokens: 2, ..spec }, 1, 8), Some(Finish::Length));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        use ErrorCode::*;
        let sampling = |change: fn(&mut proto::Sampling)| refusal(|s| change(s.sampling.as_mut().unwrap()));
        for ((code, message), expected, part) in [
            (refusal(|s| s.tokens.clear()), InvalidRequest, "sequence.tokens"),
            (refusal(|s| s.tokens[0] = 100), InvalidRequest, "id 100"),
            (refusal(|s| s.prompt_len = 0), InvalidRequest, "prompt_len"),
            (refusal(|s| s.prompt_len = 4), InvalidRequest, "prompt_len"),
            (refusal(|s| s.tokens = vec![1; 8]), ContextLength, "context of 8"),
            (refusal(|s| s.stop = None), InvalidRequest, "sequence.stop"),
            (refusal(|s| s.stop.as_mut().unwrap().max_tokens = 1), InvalidRequest, "max_tokens"),
            (refusal(|s| s.stop.as_mut().unwrap().min_tokens = 5), InvalidRequest, "min_tokens"),
            (sampling(|s| s.temperature = f32::NAN), InvalidRequest, "temperature"),
            (sampling(|s| s.top_p = 0.0), InvalidRequest, "top_p"),
            (sampling(|s| s.repetition_penalty = 0.0), InvalidRequest, "repetition_penalty"),
            (sampling(|s| s.repetition_penalty = 1e-38), InvalidRequest, "repetition_penalty"),
            (sampling(|s| s.frequency_penalty = f32::MAX), InvalidRequest, "frequency_penalty"),
            (sampling(|s| s.logit_bias = [(100, 1.0)].into()), InvalidRequest, "logit_bias"),
            (
                sampling(|s| s.logprobs = Some(21)),
                InvalidRequest,
                "21 logprobs beside each token, at most 20",
            ),
            (sampling(|s| s.prompt_logprobs = Some(21)), InvalidRequest, "21 logprobs"),
        ] {
            assert_eq!(code, expected, "{message}");
            assert!(message.contains(part), "{message}");
        }
        let forced = proto::Token { id: 4, position: 2, ..Default::default() };
        assert!(BOUNDS.spec(Some(sequence()), Some(forced)).unwrap_err().message.contains("forced"));
    }
}
