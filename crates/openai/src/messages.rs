//! Chat messages: role and text, with whatever else a chat template may read kept as it came.

use crate::fields::{Fields, out_of_range, show, wrong_type};
use crate::{Code, Error, Limits};
use serde::Serialize;
use serde_json::{Map, Value};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Message {
    pub role: String,
    /// Text parts of a list are joined by a newline, as vLLM does for templates that expect a string.
    pub content: String,
    /// `name`, `reasoning_content`, `prefix`, …: for the template alone.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Message {
    /// Of all that a template may write out.
    fn characters(&self) -> usize {
        let rest = self.rest.iter().map(|(name, value)| name.len() + text_len(value));
        self.content.chars().count() + rest.sum::<usize>()
    }
}

fn text_len(value: &Value) -> usize {
    match value {
        Value::String(text) => text.chars().count(),
        Value::Array(list) => list.iter().map(text_len).sum(),
        Value::Object(map) => map.iter().map(|(name, value)| name.len() + text_len(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 1,
    }
}

const ROLES: &str = "one of system, developer, user, assistant";

pub(crate) fn parse(fields: &mut Fields, limits: &Limits) -> Result<Vec<Message>, Error> {
    match fields.take("messages") {
        None => Err(Error::missing("messages")),
        Some(Value::Array(list)) if list.is_empty() => {
            Err(Error::value("messages", "expected at least one message"))
        }
        Some(Value::Array(list)) if list.len() > limits.messages => {
            let problem = format!("found {} messages, expected at most {}", list.len(), limits.messages);
            Err(Error::value("messages", problem))
        }
        Some(Value::Array(list)) => {
            let messages: Result<Vec<_>, _> =
                list.into_iter().enumerate().map(|(i, value)| message(i, value)).collect();
            let messages = messages?;
            limits.check_characters("messages", messages.iter().map(Message::characters).sum())?;
            Ok(messages)
        }
        Some(other) => Err(wrong_type("messages", "a list of messages", &other)),
    }
}

fn message(index: usize, value: Value) -> Result<Message, Error> {
    let mut fields = Fields::nested(value, &format!("messages[{index}]"))?;
    let role = role(&mut fields)?;
    refuse_tools(&mut fields)?;
    let content = content(&mut fields)?;
    let mut rest = fields.into_map();
    rest.retain(|_, value| !value.is_null());
    Ok(Message { role, content, rest })
}

fn role(fields: &mut Fields) -> Result<String, Error> {
    let path = fields.path("role");
    let role = fields.string("role")?.ok_or_else(|| Error::missing(&path))?;
    match role.as_str() {
        "system" | "developer" | "user" | "assistant" => Ok(role),
        "tool" | "function" => Err(Error::unsupported(path, "tool results are known, but not served yet")),
        _ => Err(out_of_range(&path, ROLES, &Value::String(role))),
    }
}

fn refuse_tools(fields: &mut Fields) -> Result<(), Error> {
    for name in ["tool_calls", "function_call", "audio", "tool_call_id"] {
        let asks = |value: &Value| !value.as_array().is_some_and(Vec::is_empty);
        if fields.take(name).is_some_and(|value| asks(&value)) {
            return Err(Error::unsupported(fields.path(name), "known, but not served yet"));
        }
    }
    Ok(())
}

fn content(fields: &mut Fields) -> Result<String, Error> {
    let path = fields.path("content");
    match fields.take("content") {
        None => Err(Error::missing(path)),
        Some(Value::String(text)) => Ok(text),
        Some(Value::Array(parts)) => {
            let texts: Result<Vec<_>, _> =
                parts.into_iter().enumerate().map(|(i, value)| part(&path, i, value)).collect();
            Ok(texts?.join("\n"))
        }
        Some(other) => Err(wrong_type(&path, "a string or a list of text parts", &other)),
    }
}

fn part(path: &str, index: usize, value: Value) -> Result<String, Error> {
    let mut fields = Fields::nested(value, &format!("{path}[{index}]"))?;
    let kind = fields.path("type");
    match fields.take("type") {
        None => return Err(Error::missing(kind)),
        Some(value) if value == "text" => {}
        Some(other) => {
            let message = format!("{kind}: only text parts are served, found {}", show(&other));
            return Err(Error::at(Code::UnsupportedParameter, kind, message));
        }
    }
    let text = fields.path("text");
    fields.string("text")?.ok_or_else(|| Error::missing(text))
}
