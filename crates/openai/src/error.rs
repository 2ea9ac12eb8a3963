//! Errors in OpenAI's shape, and the one table that gives each code its HTTP status, its `type` and its
//! name on the wire. Official clients retry on 408, 409, 429 and everything from 500 up.

use serde_json::{Value, json};
use std::time::Duration;

/// The closed set of reasons a client is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    InvalidKey,
    /// The key is good, but not an operator's.
    AdminOnly,
    /// The admin token is missing or wrong.
    AdminToken,
    /// More requests a minute than the key may make.
    RequestRate,
    /// More tokens a minute than the key may take.
    TokenRate,
    /// More requests at the same time than the key may make.
    Concurrency,
    InvalidJson,
    InvalidType,
    InvalidValue,
    MissingParameter,
    /// Known, but not served yet.
    UnsupportedParameter,
    ContextLength,
    ModelNotFound,
    /// No record of it is kept.
    RequestNotFound,
    /// No worker of that id is here.
    MemberNotFound,
    UnknownUrl,
    MethodNotAllowed,
    BodyTimeout,
    TooLarge,
    HeadersTooLarge,
    MediaType,
    Cancelled,
    Internal,
    WorkerLost,
    /// A worker did not do what it was told.
    WorkerRefused,
    Overloaded,
    Deadline,
}

impl Code {
    /// (HTTP status, `error.type`, `error.code`)
    fn row(self) -> (u16, &'static str, &'static str) {
        const REQUEST: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        const RATE: &str = "rate_limit_exceeded";
        match self {
            Code::InvalidKey => (401, REQUEST, "invalid_api_key"),
            Code::AdminOnly => (403, REQUEST, "admin_only"),
            Code::AdminToken => (401, REQUEST, "invalid_admin_token"),
            Code::RequestRate => (429, "requests", RATE),
            Code::TokenRate => (429, "tokens", RATE),
            Code::Concurrency => (429, "concurrency", RATE),
            Code::InvalidJson => (400, REQUEST, "invalid_json"),
            Code::InvalidType => (400, REQUEST, "invalid_type"),
            Code::InvalidValue => (400, REQUEST, "invalid_value"),
            Code::MissingParameter => (400, REQUEST, "missing_required_parameter"),
            Code::UnsupportedParameter => (400, REQUEST, "unsupported_parameter"),
            Code::ContextLength => (400, REQUEST, "context_length_exceeded"),
            Code::ModelNotFound => (404, REQUEST, "model_not_found"),
            Code::RequestNotFound => (404, REQUEST, "request_not_found"),
            Code::MemberNotFound => (404, REQUEST, "member_not_found"),
            Code::UnknownUrl => (404, REQUEST, "unknown_url"),
            Code::MethodNotAllowed => (405, REQUEST, "method_not_supported"),
            Code::BodyTimeout => (408, REQUEST, "timeout"),
            Code::TooLarge => (413, REQUEST, "request_too_large"),
            Code::HeadersTooLarge => (431, REQUEST, "headers_too_large"),
            Code::MediaType => (415, REQUEST, "unsupported_media_type"),
            Code::Cancelled => (499, REQUEST, "cancelled"),
            Code::Internal => (500, SERVER, "internal_error"),
            Code::WorkerLost => (502, SERVER, "worker_lost"),
            Code::WorkerRefused => (502, SERVER, "worker_refused"),
            Code::Overloaded => (503, SERVER, "server_overloaded"),
            Code::Deadline => (504, SERVER, "timeout"),
        }
    }

    pub fn status(self) -> u16 {
        self.row().0
    }

    /// `error.type`
    pub fn kind(self) -> &'static str {
        self.row().1
    }

    /// `error.code`
    pub fn name(self) -> &'static str {
        self.row().2
    }
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: Code,
    /// The field that is wrong, as a path: `messages[0].content`.
    pub param: Option<String>,
    pub message: String,
    /// For `retry-after`; set where trying again soon may help.
    pub retry_after: Option<Duration>,
}

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error { code, param: None, message: message.into(), retry_after: None }
    }

    pub fn at(code: Code, param: impl Into<String>, message: impl Into<String>) -> Self {
        Error { param: Some(param.into()), ..Error::new(code, message) }
    }

    /// A field with a value outside what is allowed; the message begins with the field's name.
    pub fn value(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param}: {problem}");
        Error::at(Code::InvalidValue, param, message)
    }

    pub fn missing(param: impl Into<String>) -> Self {
        let param = param.into();
        let message = format!("{param}: missing, but required");
        Error::at(Code::MissingParameter, param, message)
    }

    pub fn unsupported(param: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param}: {problem}");
        Error::at(Code::UnsupportedParameter, param, message)
    }

    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// `{"error": {…}}`, the body of an HTTP error and the payload of an SSE error event.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.code.kind(),
            "param": self.param,
            "code": self.code.name(),
        }})
    }
}
