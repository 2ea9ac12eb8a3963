//! `POST /v1/chat/completions`: the request.

use crate::fields::{Fields, wrong_type};
use crate::parameters::{self, token_limit};
use crate::{Error, Limits, Message, Parameters, messages, unserved};
use serde_json::{Map, Value};

/// Largest `top_logprobs`, and `logprobs` of completions.
pub(crate) const MAX_LOGPROBS: i64 = 20;

/// Variables that the template gets from Baton, so a client may not set them.
const RESERVED: &[&str] = &["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];

#[derive(Clone, Debug, PartialEq)]
pub struct ChatRequest {
    pub messages: Vec<Message>,
    pub parameters: Parameters,
    pub add_generation_prompt: bool,
    /// The last message is the beginning of the answer.
    pub continue_final_message: bool,
    /// The template writes special tokens itself, so normally none are added.
    pub add_special_tokens: bool,
    /// Further variables for the template (`thinking`, …).
    pub template_kwargs: Map<String, Value>,
}

impl ChatRequest {
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Error> {
        let mut fields = Fields::from_body(body)?;
        unserved::refuse_chat(&mut fields)?;
        let messages = messages::parse(&mut fields, limits)?;
        let (add_generation_prompt, continue_final_message) = generation_prompt(&mut fields)?;
        let add_special_tokens = fields.flag("add_special_tokens")?.unwrap_or(false);
        let template_kwargs = template_kwargs(&mut fields)?;
        let logprobs = logprobs(&mut fields)?;
        let max_tokens = max_tokens(&mut fields)?;
        let parameters = parameters::parse(fields, limits, logprobs, max_tokens)?;
        Ok(ChatRequest {
            messages,
            parameters,
            add_generation_prompt,
            continue_final_message,
            add_special_tokens,
            template_kwargs,
        })
    }
}

fn generation_prompt(fields: &mut Fields) -> Result<(bool, bool), Error> {
    let add = fields.flag("add_generation_prompt")?;
    let proceed = fields.flag("continue_final_message")?.unwrap_or(false);
    if proceed && add == Some(true) {
        return Err(Error::value(
            "continue_final_message",
            "cannot be combined with add_generation_prompt: true",
        ));
    }
    Ok((add.unwrap_or(!proceed), proceed))
}

/// `chat_template_kwargs`, with the top-level `reasoning_effort` among them: templates that know it use it.
fn template_kwargs(fields: &mut Fields) -> Result<Map<String, Value>, Error> {
    let mut kwargs = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(wrong_type("chat_template_kwargs", "an object", &other)),
    };
    if let Some(name) = RESERVED.iter().find(|name| kwargs.contains_key(**name)) {
        return Err(Error::value(
            format!("chat_template_kwargs.{name}"),
            "set by the request itself, not by kwargs",
        ));
    }
    if let Some(effort) = fields.string("reasoning_effort")? {
        kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(kwargs)
}

fn logprobs(fields: &mut Fields) -> Result<Option<u32>, Error> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let allowed = format!("an integer from 0 to {MAX_LOGPROBS}");
    let top = fields.integer("top_logprobs", &allowed, |x| (0..=MAX_LOGPROBS).contains(&x))?.unwrap_or(0);
    if top > 0 && !wanted {
        return Err(Error::value(
            "top_logprobs",
            format!("found {top}, but only allowed with logprobs: true"),
        ));
    }
    Ok(wanted.then_some(top as u32))
}

fn max_tokens(fields: &mut Fields) -> Result<Option<u32>, Error> {
    let old = token_limit(fields, "max_tokens", 1)?;
    let new = token_limit(fields, "max_completion_tokens", 1)?;
    Ok(new.or(old))
}
