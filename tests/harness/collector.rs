//! A real OpenTelemetry collector, built by tests/install, which writes what it gets to a file.

use super::root;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tokio::time::sleep;

pub struct Collector {
    /// Where it takes OTLP over gRPC.
    pub url: String,
    process: Child,
    home: tempfile::TempDir,
}

impl Collector {
    /// `None`, said aloud, where it could not be built; with `BATON_OTELCOL_REQUIRED` that is a failure.
    pub fn start() -> Option<Self> {
        let Some(binary) = binary() else {
            assert!(
                std::env::var_os("BATON_OTELCOL_REQUIRED").is_none(),
                "no otelcol: tests/install builds it with Go"
            );
            println!("skipped: there is no otelcol, which tests/install builds where there is Go");
            return None;
        };
        let home = tempfile::TempDir::new().unwrap();
        // Free a moment ago; the collector cannot say which port it has taken.
        let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = home.path().join("collector.yaml");
        std::fs::write(&config, configuration(&at.to_string(), &home.path().join("spans"))).unwrap();
        let process = Command::new(binary)
            .arg(format!("--config=file:{}", config.display()))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(home.path().join("log")).unwrap())
            .spawn()
            .expect("otelcol starts");
        let collector = Collector { url: format!("http://{at}"), process, home };
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::net::TcpStream::connect(at).is_err() {
            assert!(Instant::now() < deadline, "the collector does not listen: {}", collector.read("log"));
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(collector)
    }

    /// The spans of a trace by their ids, once there are so many.
    pub async fn trace(&self, trace_id: &str, least: usize) -> BTreeMap<String, Value> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let spans = self.spans(trace_id);
            if spans.len() >= least {
                return spans;
            }
            assert!(
                Instant::now() < deadline,
                "{} of {least} spans: {spans:#?}\n{}",
                spans.len(),
                self.read("log")
            );
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Each with the service that told it, and with its attributes beside its fields.
    pub fn spans(&self, trace_id: &str) -> BTreeMap<String, Value> {
        let mut found = BTreeMap::new();
        // A line that is still being written is for the next look.
        for line in self.read("spans").lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            for resource in line["resourceSpans"].as_array().into_iter().flatten() {
                let service = attribute(&resource["resource"], "service.name");
                let scopes = resource["scopeSpans"].as_array().into_iter().flatten();
                for span in scopes.flat_map(|scope| scope["spans"].as_array().into_iter().flatten()) {
                    let mut span = span.clone();
                    span["service"] = service.clone();
                    span["baton.of"] = attribute(&span, "baton.of");
                    if span["traceId"] == trace_id {
                        found.insert(span["spanId"].as_str().unwrap().to_owned(), span);
                    }
                }
            }
        }
        found
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.home.path().join(file)).unwrap_or_default()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn attribute(of: &Value, key: &str) -> Value {
    let attributes = of["attributes"].as_array().into_iter().flatten();
    attributes
        .filter(|attribute| attribute["key"] == key)
        .map(|found| found["value"]["stringValue"].clone())
        .next()
        .unwrap_or_default()
}

fn binary() -> Option<PathBuf> {
    let installed = root().join("target/tools/bin/otelcol");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = std::env::split_paths(&path).map(|directory| directory.join("otelcol"));
    std::iter::once(installed).chain(known).find(|binary| binary.is_file())
}

fn configuration(at: &str, spans: &std::path::Path) -> String {
    format!(
        "receivers: {{otlp: {{protocols: {{grpc: {{endpoint: {at}}}}}}}}}\n\
         processors: {{batch: {{timeout: 50ms}}}}\n\
         exporters: {{file: {{path: {}, flush_interval: 100ms}}}}\n\
         service:\n  telemetry: {{metrics: {{level: none}}}}\n  pipelines:\n    \
         traces: {{receivers: [otlp], processors: [batch], exporters: [file]}}\n",
        spans.display()
    )
}
