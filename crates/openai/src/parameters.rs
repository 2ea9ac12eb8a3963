//! What chat and completions have in common: model, sampling, where a sequence ends, streaming.
//! Absent stays absent: the defaults belong to the model and are filled in by the gateway.

use crate::fields::{Fields, integer, out_of_range, show, wrong_type};
use crate::{Error, unserved};
use serde_json::Value;

/// Most stop strings of a request.
const MAX_STOPS: usize = 16;
/// Longest stop string; what may be held back from a stream is bounded by it.
pub const MAX_STOP_BYTES: usize = 1024;
/// Most entries of `logit_bias`, and most stop token ids.
const MAX_IDS: usize = 1024;

/// What the operator allows, beyond what the API does.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest `n`.
    pub choices: u32,
    /// Most prompts of one completions request.
    pub prompts: usize,
    /// Most messages of one chat request.
    pub messages: usize,
    /// Most characters of all messages, or of all prompts given as text.
    pub characters: usize,
}

impl Limits {
    /// `found`: characters of the whole field.
    pub(crate) fn check_characters(&self, field: &str, found: usize) -> Result<(), Error> {
        if found <= self.characters {
            return Ok(());
        }
        let problem = format!("found {found} characters, expected at most {}", self.characters);
        Err(Error::value(field, problem))
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    pub model: String,
    /// Choices per prompt.
    pub n: u32,
    pub sampling: Sampling,
    pub ending: Ending,
    /// `None`: answer in one piece.
    pub streaming: Option<Streaming>,
    /// Lower first; how far it may go is the operator's to say.
    pub priority: Option<i32>,
    pub skip_special_tokens: bool,
    /// Render tokens in logprobs as `token_id:N`.
    pub tokens_as_ids: bool,
    /// Names of fields that mean nothing here; they were ignored.
    pub unknown: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0: all.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// By token id; whether the ids exist is the model's business.
    pub logit_bias: Vec<(u32, f32)>,
    /// The client's int64 taken as bits.
    pub seed: Option<u64>,
    /// How many alternatives of each token to report; `None`: no logprobs at all.
    pub logprobs: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ending {
    /// `None`: as far as the context reaches.
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<u32>,
    pub include_stop_str: bool,
    pub ignore_eos: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streaming {
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Usage so far on every chunk.
    pub continuous_usage: bool,
}

/// Reads all shared fields. `logprobs`, `max_tokens` differ between the endpoints and are read before.
pub(crate) fn parse(
    mut fields: Fields,
    limits: &Limits,
    logprobs: Option<u32>,
    max_tokens: Option<u32>,
) -> Result<Parameters, Error> {
    let model = fields.string("model")?.ok_or_else(|| Error::missing("model"))?;
    let n = choices(&mut fields, limits)?;
    let sampling = Sampling { logprobs, ..sampling(&mut fields)? };
    let ending = ending(&mut fields, max_tokens)?;
    let streaming = streaming(&mut fields)?;
    let in_i32 = |x| i32::try_from(x).is_ok();
    let priority =
        fields.integer("priority", "a 32-bit integer (lower is served first)", in_i32)?.map(|x| x as i32);
    let skip_special_tokens = fields.flag("skip_special_tokens")?.unwrap_or(true);
    let tokens_as_ids = fields.flag("return_tokens_as_token_ids")?.unwrap_or(false);
    unserved::ignore(&mut fields);
    let unknown = fields.leftover();
    Ok(Parameters {
        model,
        n,
        sampling,
        ending,
        streaming,
        priority,
        skip_special_tokens,
        tokens_as_ids,
        unknown,
    })
}

fn choices(fields: &mut Fields, limits: &Limits) -> Result<u32, Error> {
    let most = i64::from(limits.choices);
    let n = fields
        .integer("n", &format!("an integer from 1 to {most}"), |n| (1..=most).contains(&n))?
        .unwrap_or(1);
    let allowed = format!("n ({n}): choosing the best of more than n is not served");
    if let Some(best_of) = fields.integer("best_of", "a positive integer", |best_of| best_of >= 1)? {
        if best_of > n {
            return Err(Error::unsupported("best_of", format!("found {best_of}, expected {allowed}")));
        }
        if best_of < n {
            return Err(Error::value("best_of", format!("found {best_of}, expected at least n ({n})")));
        }
    }
    Ok(n as u32)
}

fn sampling(fields: &mut Fields) -> Result<Sampling, Error> {
    let penalty = |fields: &mut Fields, name| {
        narrow(fields.number(name, "a number from -2 to 2", |x| (-2.0..=2.0).contains(&x)))
    };
    Ok(Sampling {
        temperature: narrow(
            fields.number("temperature", "a number from 0 to 2", |x| (0.0..=2.0).contains(&x)),
        )?,
        top_p: narrow(fields.number("top_p", "a number above 0, at most 1", |x| x > 0.0 && x <= 1.0))?,
        top_k: top_k(fields)?,
        min_p: narrow(fields.number("min_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x)))?,
        presence_penalty: penalty(fields, "presence_penalty")?,
        frequency_penalty: penalty(fields, "frequency_penalty")?,
        repetition_penalty: narrow(fields.number(
            "repetition_penalty",
            "a number above 0, at most 1000",
            |x| x as f32 > 0.0 && x <= 1000.0,
        ))?,
        logit_bias: logit_bias(fields)?,
        seed: fields.integer("seed", "a 64-bit integer", |_| true)?.map(|seed| seed as u64),
        logprobs: None,
    })
}

fn narrow(number: Result<Option<f64>, Error>) -> Result<Option<f32>, Error> {
    Ok(number?.map(|number| number as f32))
}

fn top_k(fields: &mut Fields) -> Result<Option<u32>, Error> {
    let allowed = "-1 or 0 (all), or a positive integer";
    let top_k = fields.integer("top_k", allowed, |k| (-1..=i64::from(i32::MAX)).contains(&k))?;
    Ok(top_k.map(|k| k.max(0) as u32))
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, Error> {
    match fields.take("logit_bias") {
        None => Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() > MAX_IDS => Err(Error::value(
            "logit_bias",
            format!("found {} entries, expected at most {MAX_IDS}", map.len()),
        )),
        Some(Value::Object(map)) => map.iter().map(|(id, value)| bias(id, value)).collect(),
        Some(other) => Err(wrong_type("logit_bias", "an object from token ids to numbers", &other)),
    }
}

fn bias(id: &str, value: &Value) -> Result<(u32, f32), Error> {
    let parsed = id.parse().map_err(|_| {
        let found = show(&Value::String(id.to_owned()));
        Error::value("logit_bias", format!("keys are token ids as decimal strings, found {found}"))
    })?;
    let path = format!("logit_bias.{parsed}");
    let allowed = "a number from -100 to 100";
    let bias = value.as_f64().ok_or_else(|| wrong_type(&path, allowed, value))?;
    if (-100.0..=100.0).contains(&bias) {
        Ok((parsed, bias as f32))
    } else {
        Err(out_of_range(&path, allowed, value))
    }
}

fn ending(fields: &mut Fields, max_tokens: Option<u32>) -> Result<Ending, Error> {
    let min_tokens = fields
        .integer("min_tokens", "an integer, at least 0", |x| u32::try_from(x).is_ok())?
        .unwrap_or(0) as u32;
    if max_tokens.is_some_and(|max| min_tokens > max) {
        let max = max_tokens.unwrap_or(0);
        return Err(Error::value(
            "min_tokens",
            format!("found {min_tokens}, expected at most max_tokens ({max})"),
        ));
    }
    Ok(Ending {
        max_tokens,
        min_tokens,
        stop: stop_strings(fields)?,
        stop_token_ids: stop_token_ids(fields)?,
        include_stop_str: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
    })
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, Error> {
    let list = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(text @ Value::String(_)) => return Ok(vec![stop_string("stop", text)?]),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type("stop", "a string or a list of strings", &other)),
    };
    if list.len() > MAX_STOPS {
        return Err(Error::value(
            "stop",
            format!("found {} strings, expected at most {MAX_STOPS}", list.len()),
        ));
    }
    list.into_iter().enumerate().map(|(i, value)| stop_string(&format!("stop[{i}]"), value)).collect()
}

fn stop_string(path: &str, value: Value) -> Result<String, Error> {
    match value {
        Value::String(text) if text.is_empty() => {
            Err(Error::value(path, "expected a non-empty string, found \"\""))
        }
        Value::String(text) if text.len() > MAX_STOP_BYTES => {
            Err(Error::value(path, format!("found {} bytes, expected at most {MAX_STOP_BYTES}", text.len())))
        }
        Value::String(text) => Ok(text),
        other => Err(wrong_type(path, "a non-empty string", &other)),
    }
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, Error> {
    let list = match fields.take("stop_token_ids") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type("stop_token_ids", "a list of token ids", &other)),
    };
    if list.len() > MAX_IDS {
        return Err(Error::value(
            "stop_token_ids",
            format!("found {} ids, expected at most {MAX_IDS}", list.len()),
        ));
    }
    list.iter().enumerate().map(|(i, value)| token_id(value, &format!("stop_token_ids[{i}]"))).collect()
}

pub(crate) fn token_id(value: &Value, path: &str) -> Result<u32, Error> {
    integer(value, path, "a token id", |id| u32::try_from(id).is_ok()).map(|id| id as u32)
}

fn streaming(fields: &mut Fields) -> Result<Option<Streaming>, Error> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    let options = fields.take("stream_options");
    if !stream {
        return match options {
            None => Ok(None),
            Some(_) => Err(Error::value("stream_options", "only allowed with stream: true")),
        };
    }
    let Some(options) = options else { return Ok(Some(Streaming::default())) };
    let mut options = Fields::nested(options, "stream_options")?;
    let include_usage = options.flag("include_usage")?.unwrap_or(false);
    let continuous = options.flag("continuous_usage_stats")?.unwrap_or(false);
    Ok(Some(Streaming { include_usage, continuous_usage: include_usage && continuous }))
}

/// `max_tokens` and its like: a count from `least` up.
pub(crate) fn token_limit(fields: &mut Fields, name: &str, least: i64) -> Result<Option<u32>, Error> {
    let allowed = format!("an integer, at least {least}");
    let limit = fields.integer(name, &allowed, |x| x >= least && u32::try_from(x).is_ok())?;
    Ok(limit.map(|limit| limit as u32))
}
