//! `POST /v1/completions`: the request.

use crate::chat::MAX_LOGPROBS;
use crate::fields::{Fields, wrong_type};
use crate::parameters::{self, token_id, token_limit};
use crate::{Error, Limits, Parameters, unserved};
use serde_json::Value;

#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Of text; tokens have been read already.
    fn characters(&self) -> usize {
        match self {
            Prompt::Text(text) => text.chars().count(),
            Prompt::Tokens(_) => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct CompletionRequest {
    pub prompts: Vec<Prompt>,
    pub parameters: Parameters,
    /// Put the prompt before the completion, and its logprobs too if any are asked for.
    pub echo: bool,
    /// For prompts given as text.
    pub add_special_tokens: bool,
}

impl CompletionRequest {
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Error> {
        let mut fields = Fields::from_body(body)?;
        unserved::refuse_completions(&mut fields)?;
        let prompts = prompts(&mut fields, limits)?;
        limits.check_characters("prompt", prompts.iter().map(Prompt::characters).sum())?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let add_special_tokens = fields.flag("add_special_tokens")?.unwrap_or(true);
        let logprobs = logprobs(&mut fields)?;
        let max_tokens = token_limit(&mut fields, "max_tokens", 0)?;
        if max_tokens == Some(0) && !echo {
            return Err(Error::value(
                "max_tokens",
                "expected at least 1, found 0 (0 is allowed with echo: true)",
            ));
        }
        let parameters = parameters::parse(fields, limits, logprobs, max_tokens)?;
        Ok(CompletionRequest { prompts, parameters, echo, add_special_tokens })
    }
}

const EXPECTED: &str = "a string, a list of token ids, a list of strings or a list of lists of token ids";

fn prompts(fields: &mut Fields, limits: &Limits) -> Result<Vec<Prompt>, Error> {
    let list = match fields.take("prompt") {
        None => return Err(Error::missing("prompt")),
        Some(Value::String(text)) => return Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong_type("prompt", EXPECTED, &other)),
    };
    match list.first() {
        None => Err(Error::value("prompt", format!("expected {EXPECTED}, found an empty list"))),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(tokens(&list, "prompt")?)]),
        Some(_) if list.len() > limits.prompts => Err(Error::value(
            "prompt",
            format!("found {} prompts, expected at most {}", list.len(), limits.prompts),
        )),
        Some(_) => {
            list.into_iter().enumerate().map(|(i, value)| prompt(&format!("prompt[{i}]"), value)).collect()
        }
    }
}

fn prompt(path: &str, value: Value) -> Result<Prompt, Error> {
    match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(list) if list.is_empty() => Err(Error::value(path, "expected at least one token id")),
        Value::Array(list) => Ok(Prompt::Tokens(tokens(&list, path)?)),
        other => Err(wrong_type(path, "a string or a list of token ids", &other)),
    }
}

fn tokens(list: &[Value], path: &str) -> Result<Vec<u32>, Error> {
    let one = |(i, value): (usize, &Value)| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => token_id(value, &format!("{path}[{i}]")),
    };
    list.iter().enumerate().map(one).collect()
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Error> {
    let allowed = format!("an integer from 0 to {MAX_LOGPROBS}");
    let logprobs = fields.integer("logprobs", &allowed, |x| (0..=MAX_LOGPROBS).contains(&x))?;
    Ok(logprobs.map(|logprobs| logprobs as u32))
}
