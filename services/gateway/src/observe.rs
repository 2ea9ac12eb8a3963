//! What one request did, for logs, metrics, its record and its trace. It is told as the request goes along and speaks
//! when dropped: a request that ended without an answer's code is one whose client left (499).

use crate::gateway::Gateway;
use crate::keys::Lease;
use crate::record::{Measured, Record};
use openai::Usage;
use proto::latency::Meter;
use proto::{Latency, PartName, Place, Started};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use telemetry::Exemplar;
use telemetry::spans::Span;
use telemetry::trace::TraceContext;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

pub struct Observation {
    pub request_id: String,
    pub trace: TraceContext,
    endpoint: &'static str,
    gateway: Arc<Gateway>,
    start: Instant,
    /// 0: none yet.
    code: AtomicU16,
    seen: Mutex<Seen>,
    /// The place among concurrent requests, held for as long as this lives.
    _permit: Option<OwnedSemaphorePermit>,
    /// The claim on the account of its key, if there are keys; as long.
    lease: Option<Lease>,
}

struct Seen {
    usage: Usage,
    first_token: Option<Duration>,
    /// When each choice's last token came.
    last: HashMap<u32, Instant>,
    /// Of choice 0.
    meter: Meter,
    measured: Measured,
}

const CLIENT_LEFT: u16 = 499;
/// Refused by a limit of its key.
const LIMITED: u16 = 429;

impl Observation {
    pub fn new(
        endpoint: &'static str,
        request_id: String,
        trace: TraceContext,
        gateway: Arc<Gateway>,
        permit: Option<OwnedSemaphorePermit>,
        lease: Option<Lease>,
    ) -> Self {
        gateway.metrics.in_flight.inc();
        let start = Instant::now();
        let seen = Seen {
            usage: Usage::default(),
            first_token: None,
            last: HashMap::new(),
            meter: Meter::start(start),
            measured: Measured::default(),
        };
        let (code, seen) = (AtomicU16::new(0), Mutex::new(seen));
        Observation { request_id, trace, endpoint, gateway, start, code, seen, _permit: permit, lease }
    }

    /// The answer is complete, or failed with this status. The first word counts.
    pub fn end(&self, code: u16) {
        let _ = self.code.compare_exchange(0, code, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Charges the account for all that the request may take.
    pub fn charge(&self, tokens: u64) -> Result<(), openai::Error> {
        self.lease.as_ref().map_or(Ok(()), |lease| lease.charge(tokens))
    }

    pub fn used(&self, usage: Usage) {
        if let Some(lease) = &self.lease {
            lease.used(u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens));
        }
        self.seen(|seen| seen.usage = usage);
    }

    /// Tokens came for a choice.
    pub fn sampled(&self, index: u32, count: u32) {
        if count == 0 {
            return;
        }
        let (now, exemplar, metrics) = (Instant::now(), Exemplar::of(&self.trace), &self.gateway.metrics);
        self.seen(|seen| {
            if seen.first_token.is_none() {
                let after = now - self.start;
                seen.first_token = Some(after);
                metrics.time_to_first_token.observe(after.as_secs_f64(), exemplar);
            }
            if let Some(last) = seen.last.insert(index, now) {
                metrics.inter_token_latency.observe((now - last).as_secs_f64(), exemplar);
            }
        });
    }

    /// The model that the client asks for.
    pub fn asks(&self, model: &str, tenant: Option<&str>) {
        self.seen(|seen| {
            model.clone_into(&mut seen.measured.model);
            seen.measured.tenant = tenant.map(str::to_owned);
        });
    }

    /// Choice 0 has a place.
    pub fn placed(&self, started: &Started) {
        self.seen(|seen| seen.measured.started.clone_from(started));
    }

    /// The request is ready to be sent to a router.
    pub fn ready(&self) {
        self.seen(|seen| seen.meter.lap(PartName::Gateway, Place::Gateway));
    }

    /// The router that took choice 0 was asked then; `lost`: another before it.
    pub fn asked(&self, at: Instant, lost: bool) {
        let part = if lost { PartName::Lost } else { PartName::Gateway };
        self.seen(|seen| seen.meter.lap_until(at, part, Place::Gateway));
    }

    /// The router says something of choice 0; with a token, where the time until it went.
    pub fn heard(&self, latency: Option<&Latency>, token: bool) {
        self.seen(|seen| {
            if let Some(Latency { attempts, migrations, .. }) = latency {
                (seen.measured.attempts, seen.measured.migrations) = (*attempts, *migrations);
            }
            if token {
                seen.meter.call(latency, Place::Gateway);
            }
        });
    }

    /// What came of choice `index` is written to the client, or to the answer that it will get.
    pub fn written(&self, index: u32, tokens: u32) {
        if index > 0 || tokens == 0 {
            return;
        }
        self.seen(|seen| {
            let Some(latency) = seen.meter.token(Place::Gateway) else { return };
            let measured = &mut seen.measured;
            match measured.first {
                None => measured.first = Some(latency),
                Some(_) => measured.second = Some(latency),
            }
        });
    }

    /// As if the request ended now with this code.
    pub fn record(&self, code: u16) -> Record {
        let total = self.start.elapsed();
        let trace_id = self.trace.trace_id_hex();
        self.seen(|seen| seen.measured.record(&self.request_id, trace_id, seen.usage, code, total))
    }

    fn seen<T>(&self, see: impl FnOnce(&mut Seen) -> T) -> T {
        see(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn count(&self, record: &Record, first_token: Option<Duration>) {
        let metrics = &self.gateway.metrics;
        let exemplar = Exemplar::of(&self.trace);
        metrics.request_seconds.observe(self.start.elapsed().as_secs_f64(), exemplar, None);
        metrics.completion_tokens.inc_by(record.completion_tokens.into());
        if first_token.is_some() {
            metrics.prompt_tokens.inc_by(record.prompt_tokens.into());
            metrics.cached_prompt_tokens.inc_by(record.cached_tokens.into());
        }
    }

    fn log(&self, record: &Record, first_token: Option<Duration>) {
        tracing::info!(
            request_id = %self.request_id,
            trace_id = %record.trace_id,
            endpoint = self.endpoint,
            code = record.code,
            prompt_tokens = record.prompt_tokens,
            cached_tokens = record.cached_tokens,
            completion_tokens = record.completion_tokens,
            first_token_ms = first_token.map(|after| after.as_millis() as u64),
            total_ms = record.total_ms as u64,
            "request"
        );
    }

    /// The root of the request's trace, and what the gateway itself did.
    fn tell(&self, record: &Record) {
        let spans = &self.gateway.spans;
        if !spans.wants(&self.trace) {
            return;
        }
        self.seen(|seen| {
            for lap in seen.meter.laps() {
                spans.tell(
                    Span::part(&self.trace, lap.name.label(), lap.from, lap.to).with("baton.of", lap.of),
                );
            }
        });
        spans.tell(Span {
            context: self.trace,
            name: format!("POST {}", self.endpoint).into(),
            serves: true,
            from: self.start,
            to: Instant::now(),
            attributes: vec![
                ("http.request.method", "POST".into()),
                ("http.route", self.endpoint.into()),
                ("http.response.status_code", i64::from(record.code).into()),
                ("baton.request_id", self.request_id.clone().into()),
                ("gen_ai.request.model", record.model.clone().into()),
                ("gen_ai.usage.input_tokens", i64::from(record.prompt_tokens).into()),
                ("gen_ai.usage.output_tokens", i64::from(record.completion_tokens).into()),
            ],
            error: (record.code >= 500).then(|| format!("status {}", record.code)),
        });
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        let code = match self.code.load(Ordering::Relaxed) {
            0 => CLIENT_LEFT,
            code => code,
        };
        self.gateway.metrics.in_flight.dec();
        self.gateway.metrics.count(self.endpoint, code);
        // Whoever asks on and on beyond his limit is told so each time, and pushes out nobody's records, fills no log, no trace.
        if code == LIMITED {
            return;
        }
        let record = self.record(code);
        let first_token = self.seen(|seen| seen.first_token);
        self.count(&record, first_token);
        self.log(&record, first_token);
        self.tell(&record);
        self.gateway.records.keep(record);
    }
}
