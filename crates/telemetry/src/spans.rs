//! Spans for an OpenTelemetry collector, sent over OTLP (gRPC) by a task of its own. Whoever has a span to tell puts it into
//! a bounded queue and goes on: with no collector, a dead or a slow one, spans are dropped and counted, and no request
//! waits. Spans are told when they are over, with the moments that were measured anyway.

use crate::{Counter, Counters, Registry, trace::TraceContext};
use opentelemetry::{
    InstrumentationScope, KeyValue, SpanId, TraceFlags, TraceId, Value,
    trace::{SpanContext, SpanKind, Status, TraceState},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, time::Duration, time::SystemTime};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout},
};

/// Section `traces` of every service's configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Traces {
    /// Where a collector takes OTLP over gRPC, like http://otel:4317; empty: spans are not sent.
    pub endpoint: String,
    /// Share of the traces that begin here which are kept; one that a caller began is kept if the caller says so.
    pub sample: f64,
}

/// Spans that may wait.
const QUEUE: usize = 4096;
/// Spans sent together, at most, and how long the first of them waits for others.
const BATCH: usize = 512;
const PAUSE: Duration = Duration::from_millis(500);
/// Of one batch, and of the last ones when the process ends.
const SEND: Duration = Duration::from_secs(3);
const FLUSH: Duration = Duration::from_secs(1);
/// The variable that names the collector where the configuration does not.
const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

impl Default for Traces {
    fn default() -> Self {
        Traces { endpoint: String::new(), sample: 1.0 }
    }
}

impl Traces {
    /// What the configuration leaves open, from OpenTelemetry's own environment variable.
    pub fn or_environment(self) -> Self {
        if !self.endpoint.is_empty() {
            return self;
        }
        // A platform may set it for all it runs: what Baton cannot use then is no reason to stop.
        let endpoint = std::env::var(ENDPOINT).unwrap_or_default();
        if !endpoint.is_empty() && !endpoint.starts_with("http://") {
            tracing::warn!(
                endpoint,
                "{ENDPOINT} is no address like http://127.0.0.1:4317: no spans are sent"
            );
            return self;
        }
        Traces { endpoint, ..self }
    }

    /// Names the setting that cannot work, and what it must be.
    pub fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.sample) {
            return Err(format!("traces.sample is {}, but must be a share from 0 to 1", self.sample));
        }
        if self.endpoint.is_empty() || self.endpoint.starts_with("http://") {
            return Ok(());
        }
        Err(format!(
            "traces.endpoint is {:?}, but must be the address of a collector that takes OTLP over gRPC without TLS, \
             like http://127.0.0.1:4317",
            self.endpoint
        ))
    }
}

/// Who tells the spans.
pub struct Identity<'a> {
    /// `gateway`, `router`, `prefill`, `decode`, `both`.
    pub service: &'a str,
    /// Of this process.
    pub instance: &'a str,
    pub version: &'a str,
}

/// A name for this process among those of its service.
pub fn instance(service: &str) -> String {
    format!("{service}-{}", uuid::Uuid::new_v4())
}

/// What happened from one moment to another.
pub struct Span {
    pub context: TraceContext,
    pub name: Cow<'static, str>,
    /// It answers a call from elsewhere.
    pub serves: bool,
    pub from: Instant,
    pub to: Instant,
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Where spans go. Cheap to clone.
#[derive(Clone)]
pub struct Spans {
    sample: f64,
    queue: Option<mpsc::Sender<Told>>,
    dropped: Counters,
}

enum Told {
    Span(Box<SpanData>),
    /// Send what there is, and say so.
    Flush(oneshot::Sender<()>),
}

struct Sender {
    exporter: SpanExporter,
    /// The last batch was not taken; said once for each outage.
    failing: bool,
    told: mpsc::Receiver<Told>,
    exported: Counter,
    dropped: Counters,
}

impl Spans {
    /// Nowhere.
    pub fn off() -> Self {
        Spans { sample: 1.0, queue: None, dropped: Counters::default() }
    }

    /// Starts the task that sends them, if there is a collector. Spans that are not sent are counted in `registry`.
    pub fn start(config: &Traces, identity: &Identity<'_>, registry: &mut Registry) -> Result<Self, String> {
        config.check()?;
        let (exported, dropped) = (Counter::default(), Counters::default());
        registry.register("baton_spans_exported", "Spans that the collector has taken", exported.clone());
        registry.register("baton_spans_dropped", "Spans that nobody has taken, by reason", dropped.clone());
        ["queue_full", "not_taken"].iter().for_each(|reason| drop(dropped.get_or_create(&because(reason))));
        let queue = match config.endpoint.is_empty() {
            true => None,
            false => Some(open(config, identity, exported, dropped.clone())?),
        };
        Ok(Spans { sample: config.sample, queue, dropped })
    }

    /// The context of what is done on a caller's behalf, or of a new trace.
    pub fn context(&self, caller: Option<TraceContext>) -> TraceContext {
        match caller {
            Some(caller) => caller.child(),
            None => {
                let begun = TraceContext::start();
                TraceContext { sampled: self.samples(begun.trace_id), ..begun }
            }
        }
    }

    /// Whether a span of this context would go anywhere.
    pub fn wants(&self, context: &TraceContext) -> bool {
        self.queue.is_some() && context.sampled
    }

    pub fn tell(&self, span: Span) {
        let Some(queue) = self.queue.as_ref().filter(|_| span.context.sampled) else { return };
        if queue.try_send(Told::Span(Box::new(span.finished()))).is_err() {
            self.dropped.get_or_create(&because("queue_full")).inc();
        }
    }

    /// Sends what has been told, for a bounded time: before the process ends.
    pub async fn flush(&self) {
        let Some(queue) = &self.queue else { return };
        let (done, sent) = oneshot::channel();
        let flushed = async {
            if queue.send(Told::Flush(done)).await.is_ok() {
                let _ = sent.await;
            }
        };
        if timeout(FLUSH, flushed).await.is_err() {
            tracing::warn!("the collector has not taken the last spans in time");
        }
    }

    /// By the trace id's last 56 bits, as OpenTelemetry's own samplers: any service with the same share decides alike.
    fn samples(&self, trace_id: u128) -> bool {
        const ALL: u64 = 1 << 56;
        ((trace_id as u64 % ALL) as f64) < self.sample * ALL as f64
    }
}

fn open(
    config: &Traces,
    identity: &Identity<'_>,
    exported: Counter,
    dropped: Counters,
) -> Result<mpsc::Sender<Told>, String> {
    let builder = SpanExporter::builder().with_tonic().with_endpoint(&config.endpoint).with_timeout(SEND);
    let mut exporter = builder.build().map_err(|error| format!("traces.endpoint: {error}"))?;
    exporter.set_resource(&resource(identity));
    let (queue, told) = mpsc::channel(QUEUE);
    tokio::spawn(Sender { exporter, failing: false, told, exported, dropped }.run());
    Ok(queue)
}

fn resource(identity: &Identity<'_>) -> Resource {
    let text = |key: &'static str, value: &str| KeyValue::new(key, value.to_owned());
    Resource::builder_empty()
        .with_service_name(format!("baton-{}", identity.service))
        .with_attribute(text("service.namespace", "baton"))
        .with_attribute(text("service.instance.id", identity.instance))
        .with_attribute(text("service.version", identity.version))
        .build()
}

impl Sender {
    async fn run(mut self) {
        let mut batch = Vec::new();
        while let Some(told) = self.told.recv().await {
            let mut waiting = self.take(told, &mut batch);
            let pause = tokio::time::sleep(PAUSE);
            tokio::pin!(pause);
            while waiting.is_none() && batch.len() < BATCH {
                tokio::select! {
                    () = &mut pause => break,
                    told = self.told.recv() => match told {
                        Some(told) => waiting = self.take(told, &mut batch),
                        None => break,
                    },
                }
            }
            self.send(std::mem::take(&mut batch)).await;
            waiting.map(|done| done.send(()));
        }
    }

    fn take(&self, told: Told, batch: &mut Vec<SpanData>) -> Option<oneshot::Sender<()>> {
        match told {
            Told::Span(span) => batch.push(*span),
            Told::Flush(done) => return Some(done),
        }
        None
    }

    async fn send(&mut self, batch: Vec<SpanData>) {
        let count = batch.len() as u64;
        if count == 0 {
            return;
        }
        match timeout(SEND, self.exporter.export(batch)).await {
            Ok(Ok(())) => {
                self.failing = false;
                self.exported.inc_by(count);
            }
            failed => {
                self.dropped.get_or_create(&because("not_taken")).inc_by(count);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(?failed, "the collector takes no spans; they are dropped until it does");
                }
            }
        }
    }
}

fn because(reason: &str) -> crate::Labels {
    vec![("reason", reason.to_owned())]
}

impl Span {
    /// A part of another span.
    pub fn part(of: &TraceContext, name: &'static str, from: Instant, to: Instant) -> Self {
        let (name, attributes) = (name.into(), Vec::new());
        Span { context: of.child(), name, serves: false, from, to, attributes, error: None }
    }

    pub fn with(mut self, key: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push((key, value.into()));
        self
    }

    fn finished(self) -> SpanData {
        let (now, wall) = (Instant::now(), SystemTime::now());
        let at = |moment: Instant| wall - now.saturating_duration_since(moment);
        let TraceContext { trace_id, span_id, parent_id, .. } = self.context;
        let (trace_id, span_id) = (TraceId::from(trace_id), SpanId::from(span_id));
        SpanData {
            span_context: SpanContext::new(trace_id, span_id, TraceFlags::SAMPLED, false, TraceState::NONE),
            parent_span_id: parent_id.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: self.serves && parent_id.is_some(),
            span_kind: if self.serves { SpanKind::Server } else { SpanKind::Internal },
            name: self.name,
            start_time: at(self.from),
            end_time: at(self.to),
            attributes: self.attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: self.error.map_or(Status::Unset, Status::error),
            instrumentation_scope: InstrumentationScope::builder("baton").build(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity<'_> = Identity { service: "gateway", instance: "i", version: "1" };

    fn start(endpoint: &str, sample: f64, registry: &mut Registry) -> Spans {
        Spans::start(&Traces { endpoint: endpoint.into(), sample }, &IDENTITY, registry).unwrap()
    }

    fn dropped(spans: &Spans, reason: &str) -> u64 {
        spans.dropped.get_or_create(&because(reason)).get()
    }

    #[tokio::test]
    async fn a_dead_collector_costs_nothing_but_spans() {
        // Nobody listens there; connecting is refused at once or never answered.
        let spans = start("http://192.0.2.1:4317", 1.0, &mut Registry::default());
        let context = spans.context(None);
        let begun = std::time::Instant::now();
        for _ in 0..3 * QUEUE {
            let now = Instant::now();
            spans.tell(Span::part(&context, "queue", now, now));
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "telling took {:?}", begun.elapsed());
        assert_eq!(dropped(&spans, "queue_full"), 2 * QUEUE as u64);
        let begun = std::time::Instant::now();
        spans.flush().await;
        assert!(begun.elapsed() < Duration::from_millis(2500), "flushing took {:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn a_share_of_the_traces_is_kept_and_a_caller_decides_for_its_own() {
        let spans = start("", 0.25, &mut Registry::default());
        let kept = (0..4000).filter(|_| spans.context(None).sampled).count();
        assert!((800..1200).contains(&kept), "{kept} of 4000");
        for flags in ["00", "01"] {
            let header = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
            let context = spans.context(TraceContext::parse(&header));
            assert_eq!((context.sampled, context.parent_id), (flags == "01", Some(0xb7ad6b7169203331)));
        }
        assert!(!spans.wants(&TraceContext::start()), "nobody listens");
    }

    #[test]
    fn what_cannot_work_is_named() {
        let check =
            |endpoint: &str, sample| Traces { endpoint: endpoint.into(), sample }.check().unwrap_err();
        assert!(check("", 1.5).contains("traces.sample"));
        assert!(check("otel:4317", 1.0).contains("http://127.0.0.1:4317"));
    }
}
