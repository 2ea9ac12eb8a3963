//! What one request did, for logs and metrics. It is told as the request goes along and speaks when dropped:
//! a request that ended without an answer's code is one whose client left (499).

use crate::keys::Lease;
use openai::Usage;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use telemetry::gateway::Metrics;
use telemetry::trace::TraceContext;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

pub struct Observation {
    pub request_id: String,
    pub trace: TraceContext,
    endpoint: &'static str,
    metrics: Metrics,
    start: Instant,
    /// 0: none yet.
    code: AtomicU16,
    seen: Mutex<Seen>,
    /// The place among concurrent requests, held for as long as this lives.
    _permit: Option<OwnedSemaphorePermit>,
    /// The claim on the account of its key, if there are keys; as long.
    lease: Option<Lease>,
}

#[derive(Default)]
struct Seen {
    usage: Usage,
    first_token: Option<Duration>,
    /// When each choice's last token came.
    last: HashMap<u32, Instant>,
}

const CLIENT_LEFT: u16 = 499;

impl Observation {
    pub fn new(
        endpoint: &'static str,
        request_id: String,
        trace: TraceContext,
        metrics: Metrics,
        permit: Option<OwnedSemaphorePermit>,
        lease: Option<Lease>,
    ) -> Self {
        metrics.in_flight.inc();
        Observation {
            request_id,
            trace,
            endpoint,
            metrics,
            start: Instant::now(),
            code: AtomicU16::new(0),
            seen: Mutex::default(),
            _permit: permit,
            lease,
        }
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
        let now = Instant::now();
        self.seen(|seen| {
            if seen.first_token.is_none() {
                let after = now - self.start;
                seen.first_token = Some(after);
                self.metrics.time_to_first_token.observe(after.as_secs_f64());
            }
            if let Some(last) = seen.last.insert(index, now) {
                self.metrics.inter_token_latency.observe((now - last).as_secs_f64());
            }
        });
    }

    fn seen<T>(&self, see: impl FnOnce(&mut Seen) -> T) -> T {
        see(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Observation {
    fn drop(&mut self) {
        let code = match self.code.load(Ordering::Relaxed) {
            0 => CLIENT_LEFT,
            code => code,
        };
        let elapsed = self.start.elapsed();
        let (usage, first_token) = self.seen(|seen| (seen.usage, seen.first_token));
        self.metrics.in_flight.dec();
        self.metrics.count(self.endpoint, code);
        self.metrics.request_seconds.observe(elapsed.as_secs_f64());
        self.metrics.completion_tokens.inc_by(usage.completion_tokens.into());
        if first_token.is_some() {
            self.metrics.prompt_tokens.inc_by(usage.prompt_tokens.into());
            self.metrics.cached_prompt_tokens.inc_by(usage.cached_tokens.into());
        }
        tracing::info!(
            request_id = %self.request_id,
            trace_id = %self.trace.trace_id_hex(),
            endpoint = self.endpoint,
            code,
            prompt_tokens = usage.prompt_tokens,
            cached_tokens = usage.cached_tokens,
            completion_tokens = usage.completion_tokens,
            first_token_ms = first_token.map(|after| after.as_millis() as u64),
            total_ms = elapsed.as_millis() as u64,
            "request"
        );
    }
}
