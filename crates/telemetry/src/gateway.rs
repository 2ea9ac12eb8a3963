//! Metrics of the gateway.

use crate::{Buckets, Counters, Latency, Registry, TracedHistogram};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

#[derive(Clone)]
pub struct Metrics {
    /// By endpoint and HTTP code (499: the client left).
    pub requests: Counters,
    pub in_flight: Gauge,
    pub time_to_first_token: Latency,
    pub inter_token_latency: Latency,
    pub request_seconds: TracedHistogram,
    pub prompt_tokens: Counter,
    pub completion_tokens: Counter,
    pub cached_prompt_tokens: Counter,
    /// Answers that another router went on with.
    pub resumed: Counter,
    /// Refused by a limit of their key, by tenant and limit (requests, tokens, concurrency).
    pub limited: Counters,
    endings: Arc<[AtomicU64; 4]>,
}

/// Requests for completions that ended, by how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endings {
    /// 2xx.
    pub answered: u64,
    /// 4xx.
    pub refused: u64,
    /// The client left.
    pub left: u64,
    /// 5xx.
    pub failed: u64,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Metrics {
            requests: Counters::default(),
            in_flight: Gauge::default(),
            time_to_first_token: Latency::new(Buckets::REQUEST),
            inter_token_latency: Latency::new(Buckets::STEP),
            request_seconds: Buckets::REQUEST.traced(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            cached_prompt_tokens: Counter::default(),
            resumed: Counter::default(),
            endings: Arc::default(),
            limited: Counters::default(),
        };
        metrics.register(registry);
        metrics
    }

    /// Counts a request that ended with `code`.
    pub fn count(&self, endpoint: &str, code: u16) {
        let labels = vec![("endpoint", endpoint.to_owned()), ("code", code.to_string())];
        self.requests.get_or_create(&labels).inc();
        if endpoint.ends_with("completions") {
            self.endings[ending(code)].fetch_add(1, Relaxed);
        }
    }

    pub fn endings(&self) -> Endings {
        let [answered, refused, left, failed] = self.endings.each_ref().map(|count| count.load(Relaxed));
        Endings { answered, refused, left, failed }
    }

    /// Counts a request that a limit of its tenant has refused. Tenants are as many as the operator has named.
    pub fn count_limited(&self, tenant: &str, limit: &'static str) {
        let labels = vec![("tenant", tenant.to_owned()), ("limit", limit.to_owned())];
        self.limited.get_or_create(&labels).inc();
    }

    fn register(&self, registry: &mut Registry) {
        let m = self.clone();
        registry.register("baton_gateway_requests", "Requests ended, by endpoint and HTTP code", m.requests);
        registry.register("baton_gateway_in_flight", "Requests being served", m.in_flight);
        registry.register(
            "baton_time_to_first_token_seconds",
            "From request to first token sent",
            m.time_to_first_token.histogram,
        );
        registry.register(
            "baton_inter_token_latency_seconds",
            "Between tokens sent",
            m.inter_token_latency.histogram,
        );
        registry.register("baton_request_seconds", "From request to last byte", m.request_seconds);
        registry.register("baton_prompt_tokens", "Prompt tokens of served requests", m.prompt_tokens);
        registry.register("baton_gateway_resumed", "Answers that another router went on with", m.resumed);
        registry.register(
            "baton_gateway_limited",
            "Requests refused by a limit of their API key, by tenant and limit",
            m.limited,
        );
        registry.register("baton_completion_tokens", "Tokens generated", m.completion_tokens);
        registry.register(
            "baton_cached_prompt_tokens",
            "Prompt tokens found in a prefix cache",
            m.cached_prompt_tokens,
        );
    }
}

/// Its place in `endings`.
fn ending(code: u16) -> usize {
    match code {
        499 => 2,
        400..500 => 1,
        500.. => 3,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_are_those_of_completions() {
        let metrics = Metrics::new(&mut Registry::default());
        for code in [200, 404, 429, 499, 503] {
            metrics.count("/v1/chat/completions", code);
        }
        metrics.count("/v1/models", 200);
        assert_eq!(metrics.endings(), Endings { answered: 1, refused: 2, left: 1, failed: 1 });
    }
}
