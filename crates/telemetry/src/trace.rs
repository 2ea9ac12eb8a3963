//! Trace context as W3C Trace Context (level 1) carries it: one trace id from the gateway to decode.

use tonic::metadata::MetadataMap;
use tracing::Span;
use uuid::Uuid;

/// Name of the HTTP header and of the gRPC metadata entry.
pub const TRACEPARENT: &str = "traceparent";

/// Trace and parent span of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: u128,
    pub span_id: u64,
    /// Of the span that this one is part of.
    pub parent_id: Option<u64>,
    /// Whether anybody keeps it.
    pub sampled: bool,
}

impl TraceContext {
    /// A new trace.
    pub fn start() -> Self {
        TraceContext {
            trace_id: Uuid::new_v4().as_u128(),
            span_id: new_span_id(),
            parent_id: None,
            sampled: true,
        }
    }

    /// A span that is part of this one.
    pub fn child(self) -> Self {
        TraceContext { span_id: new_span_id(), parent_id: Some(self.span_id), ..self }
    }

    /// Reads `00-<trace>-<span>-<flags>`; `None` if it is not that.
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.trim().split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let lengths = (version.len(), trace.len(), span.len(), flags.len()) == (2, 32, 16, 2);
        let hex =
            [version, trace, span, flags].iter().all(|part| part.bytes().all(|b| b.is_ascii_hexdigit()));
        if !lengths || !hex || version == "ff" || (version == "00" && parts.next().is_some()) {
            return None;
        }
        let trace_id = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
        let span_id = u64::from_str_radix(span, 16).ok().filter(|id| *id != 0)?;
        let flags = u8::from_str_radix(flags, 16).ok()?;
        Some(TraceContext { trace_id, span_id, parent_id: None, sampled: flags & 1 == 1 })
    }

    pub fn header(&self) -> String {
        format!("00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }

    pub fn trace_id_hex(&self) -> String {
        format!("{:032x}", self.trace_id)
    }
}

pub fn inject(context: &TraceContext, metadata: &mut MetadataMap) {
    if let Ok(value) = context.header().parse() {
        metadata.insert(TRACEPARENT, value);
    }
}

/// The caller's context, if it sent one.
pub fn extract(metadata: &MetadataMap) -> Option<TraceContext> {
    metadata.get(TRACEPARENT).and_then(|value| TraceContext::parse(value.to_str().ok()?))
}

/// A span whose log lines carry the trace and the request.
pub fn span(name: &'static str, context: &TraceContext, request_id: &str) -> Span {
    tracing::info_span!("request", part = name, trace_id = %context.trace_id_hex(), request_id)
}

fn new_span_id() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_survives_the_wire() {
        let context = TraceContext::start();
        let mut metadata = MetadataMap::new();
        inject(&context, &mut metadata);
        assert_eq!(extract(&metadata), Some(context));
    }

    #[test]
    fn what_is_not_a_traceparent_is_refused() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(TraceContext::parse(good).unwrap().header(), good);
        let zero = "00-00000000000000000000000000000000-b7ad6b7169203331-01";
        for bad in ["", "00", zero, &good[..54], "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
    }
}
