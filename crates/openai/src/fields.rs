//! One JSON object, taken apart field by field. Every complaint names the field, shows the value found
//! (shortened, so that no request can make the answer large) and says what is allowed. `null` is absent.

use crate::{Code, Error};
use serde_json::{Map, Value};

/// Longest echo of a client's value, in characters.
const ECHO: usize = 64;

pub(crate) struct Fields {
    map: Map<String, Value>,
    /// Path of this object, with its trailing dot; empty at top level.
    prefix: String,
}

impl Fields {
    pub fn from_body(body: &[u8]) -> Result<Self, Error> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields { map, prefix: String::new() }),
            Ok(other) => Err(Error::new(
                Code::InvalidJson,
                format!("the body must be a JSON object, found {}", kind(&other)),
            )),
            Err(error) => Err(Error::new(Code::InvalidJson, format!("the body is not valid JSON: {error}"))),
        }
    }

    pub fn nested(value: Value, path: &str) -> Result<Self, Error> {
        match value {
            Value::Object(map) => Ok(Fields { map, prefix: format!("{path}.") }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The field's value, unless absent or null.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(wrong_type(&self.path(name), "true or false", &other)),
        }
    }

    pub fn string(&mut self, name: &str) -> Result<Option<String>, Error> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.path(name), "a string", &other)),
        }
    }

    /// A number for which `ok` holds; `allowed` says so in words.
    pub fn number(
        &mut self,
        name: &str,
        allowed: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<Option<f64>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let path = self.path(name);
        let number = value.as_f64().ok_or_else(|| wrong_type(&path, allowed, &value))?;
        if ok(number) { Ok(Some(number)) } else { Err(out_of_range(&path, allowed, &value)) }
    }

    /// A whole number for which `ok` holds.
    pub fn integer(
        &mut self,
        name: &str,
        allowed: &str,
        ok: impl Fn(i64) -> bool,
    ) -> Result<Option<i64>, Error> {
        let Some(value) = self.take(name) else { return Ok(None) };
        integer(&value, &self.path(name), allowed, ok).map(Some)
    }

    /// Names of the fields nobody asked for: ignored, and worth a debug line.
    pub fn leftover(self) -> Vec<String> {
        self.map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, _)| shorten(&name))
            .take(16)
            .collect()
    }

    pub fn into_map(self) -> Map<String, Value> {
        self.map
    }
}

pub(crate) fn integer(
    value: &Value,
    path: &str,
    allowed: &str,
    ok: impl Fn(i64) -> bool,
) -> Result<i64, Error> {
    let whole = match value {
        Value::Number(number) => number.as_i64().or_else(|| whole(number.as_f64()?)),
        other => return Err(wrong_type(path, allowed, other)),
    };
    whole.filter(|whole| ok(*whole)).ok_or_else(|| out_of_range(path, allowed, value))
}

/// 10.0 is 10; 10.5 and what a double cannot hold exactly are not whole.
fn whole(number: f64) -> Option<i64> {
    (number.fract() == 0.0 && number.abs() <= 9_007_199_254_740_992.0).then_some(number as i64)
}

pub(crate) fn wrong_type(path: &str, expected: &str, found: &Value) -> Error {
    Error::at(Code::InvalidType, path, format!("{path}: expected {expected}, found {}", show(found)))
}

pub(crate) fn out_of_range(path: &str, allowed: &str, found: &Value) -> Error {
    Error::value(path, format!("expected {allowed}, found {}", show(found)))
}

/// A value as an error message may repeat it.
pub(crate) fn show(value: &Value) -> String {
    match value {
        Value::Array(_) | Value::Object(_) => kind(value).to_owned(),
        Value::String(text) => format!("{:?}", shorten(text)),
        other => shorten(&other.to_string()),
    }
}

/// At most 64 characters of a client's text, with a mark where it was cut.
pub fn shorten(text: &str) -> String {
    match text.char_indices().nth(ECHO) {
        None => text.to_owned(),
        Some((cut, _)) => format!("{}…", &text[..cut]),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
