//! What is observed: logs, metrics, trace context and spans, and the admin port that shows them. Every metric
//! name of the outward contract stands in one of the three files named after the services. Knows
//! nothing of what it counts.

pub mod admin;
pub mod credentials;
pub mod gateway;
mod latency;
mod log;
pub mod phase;
pub mod router;
pub mod spans;
pub mod trace;
pub mod worker;

pub use admin::Readiness;
pub use latency::{Latency, Sketch};
pub use log::init;
pub use prometheus_client::{metrics::counter::Counter, registry::Registry};
pub use spans::{Spans, Traces};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::{
    exemplar::HistogramWithExemplars,
    family::{Family, MetricConstructor},
    gauge::Gauge,
    histogram::Histogram,
};

/// A set of label names and values, in the order given.
pub type Labels = Vec<(&'static str, String)>;
pub type Counters = Family<Labels, Counter>;
pub type Gauges = Family<Labels, Gauge>;
pub type Histograms = Family<Labels, Histogram, Buckets>;

/// A histogram that names a trace for each of its buckets: the last one that fell into it.
pub type TracedHistogram = HistogramWithExemplars<Exemplar>;

/// What an exemplar says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Exemplar {
    trace_id: TraceId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TraceId(u128);

impl EncodeLabelValue for TraceId {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        std::fmt::Write::write_fmt(encoder, format_args!("{:032x}", self.0))
    }
}

impl Exemplar {
    /// None of a trace that nobody keeps.
    pub fn of(context: &trace::TraceContext) -> Option<Self> {
        context.sampled.then_some(Exemplar { trace_id: TraceId(context.trace_id) })
    }
}

/// Upper bounds of a histogram's buckets; makes the histograms of a family.
#[derive(Clone, Copy)]
pub struct Buckets(&'static [f64]);

impl Buckets {
    /// From half a millisecond to ten minutes: waiting times of requests.
    pub const REQUEST: Buckets = Buckets(&[
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        120.0, 300.0, 600.0,
    ]);
    /// From a tenth of a millisecond to ten seconds: steps, tokens, transfers.
    pub const STEP: Buckets = Buckets(&[
        0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25,
        0.5, 1.0, 2.5, 10.0,
    ]);
    /// Tokens of a batch.
    pub const TOKENS: Buckets = Buckets(&[
        1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
    ]);

    pub fn histogram(self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }

    pub fn traced(self) -> TracedHistogram {
        HistogramWithExemplars::new(self.0.iter().copied())
    }
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        self.histogram()
    }
}

fn histograms(buckets: Buckets) -> Histograms {
    Family::new_with_constructor(buckets)
}
