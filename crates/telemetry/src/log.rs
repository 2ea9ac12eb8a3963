//! Logs go to stderr: stdout belongs to the line that says where a service listens. Each service writes a line
//! when its part of a request ends, so that a trace id can be followed from the gateway to decode.

use tracing_subscriber::{EnvFilter, fmt::format::FmtSpan};

/// Sends this process's logs to stderr. `BATON_LOG` (or `RUST_LOG`) filters them, "info" by default;
/// `BATON_LOG_FORMAT=json` makes each line a JSON object. A second call changes nothing.
pub fn init(service: &str) {
    let directives = std::env::var("BATON_LOG").or_else(|_| std::env::var("RUST_LOG"));
    let filter = EnvFilter::new(directives.as_deref().unwrap_or("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_span_events(FmtSpan::CLOSE)
        .with_writer(std::io::stderr);
    let set = match std::env::var("BATON_LOG_FORMAT").as_deref() {
        Ok("json") => builder.json().try_init(),
        _ => builder.with_ansi(false).try_init(),
    };
    if set.is_ok() {
        tracing::debug!(service, pid = std::process::id(), "logging");
    }
}
