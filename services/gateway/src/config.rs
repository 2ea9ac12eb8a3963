//! The gateway's configuration: one TOML file, read once at start. Durations are milliseconds.

use credentials::TlsConfig;
use serde::Deserialize;
use std::{net::SocketAddr, path::PathBuf, time::Duration};
use telemetry::Traces;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The OpenAI API, with `/health`, `/ready` and `/metrics` beside it.
    pub listen: SocketAddr,
    /// `/health`, `/ready`, `/metrics` again, for a network of its own.
    pub admin: SocketAddr,
    /// File with the token for orders to workers (`POST /status/members/ID/drain`, for which the page has a button), at least 16
    /// characters, read anew for each; the workers' own `admin_token_file` must be the same. Absent: orders are refused.
    /// Order and token go to the address that the membership holds, so whoever can write there is given the token: let only the
    /// known write, by `tls` of all services, or etcd with TLS and client certificates.
    pub admin_token_file: Option<PathBuf>,
    /// gRPC addresses of routers. A request goes to one; if that one does not answer, to the next.
    pub routers: Vec<String>,
    /// Secures the connections to routers, in both directions; all services must agree. Clients' connections are the business
    /// of what stands before the gateway.
    pub tls: Option<TlsConfig>,
    /// Directory in Hugging Face layout: tokenizer.json, tokenizer_config.json, config.json and, if
    /// there are any, generation_config.json and chat_template.jinja. Weights are not read.
    pub model_dir: PathBuf,
    /// Refuse to serve while a worker of the model has other files (tokenizer, template, configuration) than `model_dir`: its
    /// token ids may mean other text. False: for a chat template of one's own.
    pub match_files: bool,
    /// Names by which clients may ask for the model; responses carry the one asked for. Empty: the
    /// name of `model_dir`.
    pub served_model_name: Vec<String>,
    /// Name under which the workers registered the model; empty: whatever they serve.
    pub worker_model: String,
    /// Tokens of prompt and output together; 0: what config.json says. The workers' own bound holds beside it.
    pub max_context: u32,
    /// `max_tokens` of `/v1/completions` when the client gives none; 0: as far as the context reaches.
    /// (OpenAI's own default is 16.) Chat always goes as far as the context reaches.
    pub default_completion_tokens: u32,
    /// The page at `/dashboard`, and from `/` to it.
    pub dashboard: bool,
    pub keys: Keys,
    pub limits: Limits,
    pub stream: Stream,
    pub timeouts: Timeouts,
    pub traces: Traces,
}

/// Who may ask.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keys {
    /// The API keys' entries, as `baton key new` prints them; read again when it changes. Absent: everybody may ask.
    pub file: Option<PathBuf>,
    /// Tokens of output that a request without `max_tokens` is charged, for each choice, until it ends and the true number is known.
    pub assumed_output_tokens: u32,
}

/// Beyond any of these a request is refused at once, by name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a request body (413).
    pub body_bytes: usize,
    /// Requests at the same time (503 with retry-after).
    pub concurrent_requests: usize,
    /// Largest `n`.
    pub choices: u32,
    /// Connections at the same time (503 with retry-after).
    pub connections: usize,
    /// Header fields of a request (431).
    pub headers: usize,
    /// Bytes of a request's URL and header fields together (431).
    pub header_bytes: usize,
    /// Messages of one chat request (400). A template may look at each message once for each other one.
    pub messages: usize,
    /// Characters of all messages, or of all prompts given as text (400).
    pub characters: usize,
    /// Prompts of one completions request.
    pub prompts: usize,
    /// Prompts times `n`.
    pub sequences: usize,
    /// Tokens of one prompt; 0: the context is the limit.
    pub prompt_tokens: u32,
    /// The lowest number, and so the highest priority, that a request may ask for (400); a key may have a bound of its own.
    pub priority_min: i32,
    /// The highest number.
    pub priority_max: i32,
    /// Large bodies parsed and tokenised at the same time, away from the threads that stream; 0: one per core.
    pub tokenizers: usize,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stream {
    /// Silence after which a comment goes to the client, so that proxies keep the connection; 0: never.
    pub keep_alive_ms: u64,
    /// A stream's headers wait for the router's first event, so that an error can still be an HTTP error;
    /// but no longer than this. 0: for as long as it takes.
    pub commit_ms: u64,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the first byte of a request to the last of its answer.
    pub request_ms: u64,
    /// For the client to send a request's header (408); a connection that lies idle for as long is closed.
    pub header_ms: u64,
    /// For the client to send its body (408).
    pub body_ms: u64,
    /// In the router's queue; 0: the router's own default.
    pub queue_ms: u32,
    /// Connecting to a router.
    pub connect_ms: u64,
    /// A router that sends no event, not even a heartbeat, for this long is lost.
    pub silence_ms: u64,
    /// A router lost in the middle of an answer: how long to look for one that goes on with it.
    pub resume_ms: u64,
    /// A client that takes nothing of its stream for this long is given up.
    pub stalled_client_ms: u64,
    /// What `retry-after` says with a 503.
    pub retry_after_ms: u64,
    /// After the signal to stop: how long running answers may go on.
    pub drain_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 8000)),
            admin: SocketAddr::from(([127, 0, 0, 1], 8001)),
            admin_token_file: None,
            routers: vec!["http://127.0.0.1:7700".into()],
            tls: None,
            model_dir: PathBuf::new(),
            match_files: true,
            served_model_name: Vec::new(),
            worker_model: String::new(),
            max_context: 0,
            default_completion_tokens: 0,
            dashboard: true,
            keys: Keys::default(),
            limits: Limits::default(),
            stream: Stream::default(),
            timeouts: Timeouts::default(),
            traces: Traces::default(),
        }
    }
}

impl Default for Keys {
    fn default() -> Self {
        Keys { file: None, assumed_output_tokens: 1024 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes: 8 << 20,
            concurrent_requests: 1024,
            connections: 4096,
            headers: 100,
            header_bytes: 32 << 10,
            messages: 2048,
            characters: 4 << 20,
            choices: 128,
            prompts: 128,
            sequences: 256,
            prompt_tokens: 0,
            priority_min: -10,
            priority_max: 10,
            tokenizers: 0,
        }
    }
}

impl Default for Stream {
    fn default() -> Self {
        Stream { keep_alive_ms: 15_000, commit_ms: 5_000 }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            request_ms: 600_000,
            header_ms: 30_000,
            body_ms: 30_000,
            queue_ms: 0,
            connect_ms: 2_000,
            silence_ms: 10_000,
            resume_ms: 10_000,
            stalled_client_ms: 60_000,
            retry_after_ms: 1_000,
            drain_ms: 5_000,
        }
    }
}

impl Limits {
    /// What a request may ask for, before the model is asked.
    pub(crate) fn of_requests(&self) -> openai::Limits {
        openai::Limits {
            choices: self.choices,
            prompts: self.prompts,
            messages: self.messages,
            characters: self.characters,
        }
    }
}

impl Config {
    /// Names the first setting that cannot work, and what it must be.
    pub fn check(&self) -> Result<(), String> {
        let positive = [
            ("limits.body_bytes", self.limits.body_bytes as u64),
            ("limits.concurrent_requests", self.limits.concurrent_requests as u64),
            ("limits.connections", self.limits.connections as u64),
            ("limits.headers", self.limits.headers as u64),
            ("limits.header_bytes", self.limits.header_bytes as u64),
            ("limits.messages", self.limits.messages as u64),
            ("limits.characters", self.limits.characters as u64),
            ("limits.choices", self.limits.choices.into()),
            ("limits.prompts", self.limits.prompts as u64),
            ("limits.sequences", self.limits.sequences as u64),
            ("timeouts.request_ms", self.timeouts.request_ms),
            ("timeouts.header_ms", self.timeouts.header_ms),
            ("timeouts.body_ms", self.timeouts.body_ms),
            ("timeouts.connect_ms", self.timeouts.connect_ms),
            ("timeouts.silence_ms", self.timeouts.silence_ms),
            ("timeouts.stalled_client_ms", self.timeouts.stalled_client_ms),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(format!("{name} is 0, but must be at least 1"));
        }
        if self.limits.priority_min > self.limits.priority_max {
            return Err("limits.priority_min is more than limits.priority_max".into());
        }
        if self.routers.is_empty() {
            return Err(
                "routers is empty, but must list at least one address, like http://127.0.0.1:7700".into()
            );
        }
        if self.model_dir.as_os_str().is_empty() {
            return Err("model_dir is missing: the directory with tokenizer.json and config.json".into());
        }
        self.traces.check()
    }
}

pub(crate) fn ms(value: u64) -> Duration {
    Duration::from_millis(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<Config>("[limits]\nbody = 3\n").unwrap_err();
        assert!(error.to_string().contains("body"), "{error}");
    }

    #[test]
    fn what_cannot_work_is_named() {
        let config: Config = toml::from_str("model_dir = \"m\"\n[limits]\nchoices = 0\n").unwrap();
        assert!(config.check().unwrap_err().contains("limits.choices"));
        assert!(Config::default().check().unwrap_err().contains("model_dir"));
    }
}
