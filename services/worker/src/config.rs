//! The worker's configuration: one TOML file, read once at start. Durations are milliseconds.

use crate::{Error, simulated};
use credentials::TlsConfig;
use handoff::{Patience, deliver};
use membership::MembershipConfig;
use serde::{Deserialize, Serialize};
use std::{net::SocketAddr, path::PathBuf, time::Duration};
use telemetry::Traces;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Prefill,
    Decode,
    #[default]
    Both,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    /// The files of the model's directory.
    #[default]
    Safetensors,
    /// A seed; only config.json is read. For measuring: what such a model says means nothing.
    Random,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub role: Role,
    /// What computes: one of [`BACKENDS`].
    pub backend: String,
    /// Hugging Face directory of the model.
    pub model: PathBuf,
    pub load_format: LoadFormat,
    /// Of random weights.
    pub seed: u64,
    /// Name under which the model is asked for; the directory's name if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served_model_name: Option<String>,
    /// gRPC. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Health, readiness, metrics and `/debug/pool` over HTTP.
    pub admin: SocketAddr,
    /// The token that whoever asks this worker to leave must bring (`authorization: Bearer …`); absent: everybody who reaches
    /// `admin` may ask. `admin` is plain HTTP, with `tls` too: the token travels in clear.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_token_file: Option<PathBuf>,
    /// Secures the connections to routers and other workers, in both directions; all services must agree.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
    /// http://host:port (https:// with `tls`) under which routers and prefill workers reach `listen`; needed when that is 0.0.0.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// The same for `admin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise_admin: Option<String>,
    /// Tokens in a KV block. Workers that exchange blocks must agree.
    pub block_tokens: u32,
    /// Blocks in the KV pool; computed from `kv_cache_mb` or `gpu_memory_utilization` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_blocks: Option<u32>,
    /// Size of the KV pool in MiB; if absent, on a GPU what `gpu_memory_utilization` leaves, on a CPU [`CPU_CACHE_MB`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_mb: Option<u64>,
    /// Share of the GPU's memory that this worker takes in all. Workers of one GPU must share it out.
    pub gpu_memory_utilization: f32,
    /// Sequences in one step.
    pub max_sequences: u32,
    /// Tokens in one step, and so the largest chunk of a prompt.
    pub max_step_tokens: u32,
    /// Tokens of prompt and output together; the model's own limit if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_context: Option<u32>,
    /// Whether the KV blocks of a prompt serve later prompts that begin alike.
    pub prefix_cache: bool,
    /// Largest share of the pool that may be reserved and not yet decoding.
    pub max_reserved_share: f32,
    /// Sequences that may wait for the engine.
    pub waiting: u32,
    /// Threads that compute; 0: one for each core.
    pub threads: usize,
    pub membership: MembershipConfig,
    pub liveness: Liveness,
    pub handoff: Handoff,
    /// Time of a step on the backend `sim`.
    pub simulated: simulated::Cost,
    /// When the worker is told to leave: how long running sequences may go on here before they go on elsewhere.
    pub drain_ms: u64,
    /// After that, how long blocks on offer may wait to be accepted.
    pub handover_ms: u64,
    pub traces: Traces,
    pub debug: Debug,
}

/// For tests only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Debug {
    /// The step that breaks the device: on a GPU a kernel then reads where no memory is. The worker ends, as it must.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fail_step: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Liveness {
    /// Pace of the heartbeats on every open stream.
    pub heartbeat_ms: u64,
    /// A delivery's peer silent for this long is lost.
    pub silence_ms: u64,
    /// How long a reservation waits for a delivery to open, or for the router after one was lost.
    pub reservation_ms: u64,
    /// How long a block's bytes may take to land; then the reservation ends. A block into which something still writes when its
    /// reservation ends is quarantined until that has ended.
    pub landing_ms: u64,
    /// A router that takes no event for this long is given up.
    pub stalled_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Handoff {
    /// KiB of blocks read and not yet accepted, of one delivery.
    pub window_kb: u64,
    /// Times that one block may be offered before the delivery fails.
    pub tries: u32,
    /// How blocks get from prefill to decode. All workers must agree.
    pub transport: Transport,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// In the messages of the hand-off.
    #[default]
    Grpc,
    /// Decode reads them out of prefill's memory: RDMA, or what NIXL finds. Needs a binary built with the feature `rdma`, and NIXL.
    Nixl,
}

/// What [`Config::backend`] may name. `cuda` needs a binary built with the feature of that name, and a Hopper GPU; `sim`
/// computes nothing and answers as if.
pub const BACKENDS: [&str; 3] = ["cpu", "cuda", "sim"];

/// MiB of the KV pool of a worker that computes on CPUs.
pub const CPU_CACHE_MB: u64 = 128;

/// Share of a GPU's memory that one worker takes if it is not told: the rest is for the driver, recorded steps and what
/// else runs there.
pub const GPU_SHARE: f32 = 0.9;

impl Default for Config {
    fn default() -> Self {
        Config {
            role: Role::Both,
            backend: "cpu".into(),
            model: PathBuf::new(),
            load_format: LoadFormat::default(),
            seed: 0,
            served_model_name: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            admin: SocketAddr::from(([127, 0, 0, 1], 0)),
            admin_token_file: None,
            tls: None,
            advertise: None,
            advertise_admin: None,
            block_tokens: 64,
            kv_blocks: None,
            kv_cache_mb: None,
            gpu_memory_utilization: GPU_SHARE,
            max_sequences: 64,
            max_step_tokens: 512,
            max_context: None,
            prefix_cache: true,
            max_reserved_share: 0.5,
            waiting: 1024,
            threads: 0,
            membership: MembershipConfig::default(),
            liveness: Liveness::default(),
            handoff: Handoff::default(),
            simulated: simulated::Cost::default(),
            drain_ms: 5_000,
            handover_ms: 2_000,
            traces: Traces::default(),
            debug: Debug::default(),
        }
    }
}

impl Default for Liveness {
    fn default() -> Self {
        Liveness {
            heartbeat_ms: 1_000,
            silence_ms: 10_000,
            reservation_ms: 30_000,
            landing_ms: 10_000,
            stalled_ms: 30_000,
        }
    }
}

impl Default for Handoff {
    fn default() -> Self {
        Handoff { window_kb: 16 << 10, tries: 3, transport: Transport::default() }
    }
}

impl Config {
    /// What [`crate::run`] refuses before it binds or loads anything.
    pub fn check(&self) -> Result<(), Error> {
        if !BACKENDS.contains(&self.backend.as_str()) {
            return Err(Error::Backend(self.backend.clone()));
        }
        if self.model.as_os_str().is_empty() {
            return Err(wrong("model", "is not set", "give the directory of a model in Hugging Face layout"));
        }
        for (key, value) in [
            ("block_tokens", u64::from(self.block_tokens)),
            ("max_sequences", u64::from(self.max_sequences)),
            ("max_step_tokens", u64::from(self.max_step_tokens)),
            ("kv_blocks", self.kv_blocks.map_or(1, u64::from)),
            ("kv_cache_mb", self.kv_cache_mb.unwrap_or(1)),
            ("liveness.heartbeat_ms", self.liveness.heartbeat_ms),
            ("liveness.landing_ms", self.liveness.landing_ms),
            ("handoff.tries", u64::from(self.handoff.tries)),
        ] {
            if value == 0 {
                return Err(wrong(key, "is 0", "give at least 1"));
            }
        }
        if !(self.max_reserved_share > 0.0 && self.max_reserved_share <= 1.0) {
            return Err(wrong("max_reserved_share", "is not a share", "give a number above 0 and up to 1"));
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            return Err(wrong(
                "gpu_memory_utilization",
                "is not a share",
                "give a number above 0 and up to 1",
            ));
        }
        if self.liveness.silence_ms <= 2 * self.liveness.heartbeat_ms {
            return Err(wrong("liveness.silence_ms", "is too short", "give more than twice heartbeat_ms"));
        }
        self.traces.check().map_err(Error::Traces)?;
        self.check_advertised()?;
        self.check_transport()?;
        Ok(self.membership.check()?)
    }

    /// What would be refused after the model is loaded.
    fn check_transport(&self) -> Result<(), Error> {
        if self.handoff.transport == Transport::Grpc {
            return Ok(());
        }
        if self.backend != "cpu" {
            let fix = "use grpc, or backend = \"cpu\": memory of a device is not registered yet";
            return Err(wrong(
                "handoff.transport",
                "is nixl, but of this backend its KV pool is not in host memory",
                fix,
            ));
        }
        handoff::nixl::check().map_err(Error::Transport)
    }

    fn check_advertised(&self) -> Result<(), Error> {
        for (key, listen, advertise) in [
            ("advertise", self.listen, &self.advertise),
            ("advertise_admin", self.admin, &self.advertise_admin),
        ] {
            if listen.ip().is_unspecified() && advertise.is_none() {
                let fix = "give http://host:port as others reach this worker";
                return Err(wrong(key, "is needed when listening on every address", fix));
            }
        }
        let scheme = format!("{}://", self.scheme());
        let mut addresses = self.advertise.iter().chain(&self.membership.registry);
        match (addresses.all(|url| url.starts_with(&scheme)), &self.tls) {
            (true, _) => Ok(()),
            (false, Some(_)) => {
                let what = "is set, but advertise or membership.registry is not https";
                Err(wrong("tls", what, "write https://host:port"))
            }
            (false, None) => {
                let what = "is not set, but advertise or membership.registry is not http";
                Err(wrong("tls", what, "set tls, or write http://host:port"))
            }
        }
    }

    /// Of the addresses of services.
    pub(crate) fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    pub(crate) fn patience(&self) -> Patience {
        Patience {
            silence: Duration::from_millis(self.liveness.silence_ms),
            delivery: Duration::from_millis(self.liveness.reservation_ms),
            landing: Duration::from_millis(self.liveness.landing_ms),
        }
    }

    pub(crate) fn deliver(&self) -> deliver::Options {
        deliver::Options {
            window_bytes: (self.handoff.window_kb as usize) << 10,
            tries: self.handoff.tries,
            silence: Duration::from_millis(self.liveness.silence_ms),
            heartbeat: Duration::from_millis(self.liveness.heartbeat_ms),
        }
    }
}

fn wrong(key: &'static str, what: &'static str, fix: &'static str) -> Error {
    Error::Config { key, what, fix }
}

impl Transport {
    /// As configuration and metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Grpc => "grpc",
            Transport::Nixl => "nixl",
        }
    }
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Prefill => "prefill",
            Role::Decode => "decode",
            Role::Both => "both",
        }
    }

    pub(crate) fn prefills(self) -> bool {
        self != Role::Decode
    }

    pub(crate) fn decodes(self) -> bool {
        self != Role::Prefill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(toml: &str) -> String {
        let text = format!("model = \"m\"\nmembership.registry = \"http://router:1\"\n{toml}");
        match toml::from_str::<Config>(&text) {
            Ok(config) => config.check().map_or_else(|error| error.to_string(), |()| "ok".into()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn wrong_values_are_named() {
        assert_eq!(check("role = \"decode\"\nkv_blocks = 9"), "ok");
        for (toml, part) in [
            ("rol = \"decode\"", "unknown field `rol`"),
            ("role = \"draft\"", "unknown variant `draft`"),
            ("backend = \"tpu\"", "tpu"),
            ("block_tokens = 0", "block_tokens"),
            ("max_reserved_share = 1.5", "max_reserved_share"),
            ("gpu_memory_utilization = 90", "gpu_memory_utilization"),
            ("handoff.transport = \"rdma\"", "unknown variant `rdma`, expected `grpc` or `nixl`"),
            ("load_format = \"gguf\"", "unknown variant `gguf`"),
            ("listen = \"0.0.0.0:7000\"", "advertise"),
            ("liveness.silence_ms = 1500", "silence_ms"),
            ("tls = {ca = \"a\", cert = \"b\", key = \"c\"}", "is not https"),
            ("advertise = \"https://a:1\"", "set tls"),
            ("tls = {ca = \"a\", cert = \"b\"}", "missing field `key`"),
        ] {
            assert!(check(toml).contains(part), "{toml}: {}", check(toml));
        }
    }
}
