//! Metrics of the gateway.

use crate::{Buckets, Counters, Registry, TracedHistogram};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

#[derive(Clone)]
pub struct Metrics {
    /// By endpoint and HTTP code (499: the client left).
    pub requests: Counters,
    pub in_flight: Gauge,
    pub time_to_first_token: TracedHistogram,
    pub inter_token_latency: TracedHistogram,
    pub request_seconds: TracedHistogram,
    pub prompt_tokens: Counter,
    pub completion_tokens: Counter,
    pub cached_prompt_tokens: Counter,
    /// Answers that another router went on with.
    pub resumed: Counter,
}

impl Metrics {
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Metrics {
            requests: Counters::default(),
            in_flight: Gauge::default(),
            time_to_first_token: Buckets::REQUEST.traced(),
            inter_token_latency: Buckets::STEP.traced(),
            request_seconds: Buckets::REQUEST.traced(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            cached_prompt_tokens: Counter::default(),
            resumed: Counter::default(),
        };
        metrics.register(registry);
        metrics
    }

    /// Counts a request that ended with `code`.
    pub fn count(&self, endpoint: &str, code: u16) {
        let labels = vec![("endpoint", endpoint.to_owned()), ("code", code.to_string())];
        self.requests.get_or_create(&labels).inc();
    }

    fn register(&self, registry: &mut Registry) {
        let m = self.clone();
        registry.register("baton_gateway_requests", "Requests ended, by endpoint and HTTP code", m.requests);
        registry.register("baton_gateway_in_flight", "Requests being served", m.in_flight);
        registry.register(
            "baton_time_to_first_token_seconds",
            "From request to first token sent",
            m.time_to_first_token,
        );
        registry.register("baton_inter_token_latency_seconds", "Between tokens sent", m.inter_token_latency);
        registry.register("baton_request_seconds", "From request to last byte", m.request_seconds);
        registry.register("baton_prompt_tokens", "Prompt tokens of served requests", m.prompt_tokens);
        registry.register("baton_gateway_resumed", "Answers that another router went on with", m.resumed);
        registry.register("baton_completion_tokens", "Tokens generated", m.completion_tokens);
        registry.register(
            "baton_cached_prompt_tokens",
            "Prompt tokens found in a prefix cache",
            m.cached_prompt_tokens,
        );
    }
}
