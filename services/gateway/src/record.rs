//! Where the time of one request went, part by part, and the records of the requests that ended last. A part comes
//! from the service that spent it; nothing here is computed as what is left of the whole.

use openai::Usage;
use proto::{Latency, PartName, Place, Started};
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

#[derive(Clone, Debug, Serialize)]
pub struct Record {
    pub request_id: String,
    pub trace_id: String,
    /// Whose request it was, if the gateway has keys: the only one who is shown the record, but for operators.
    #[serde(skip)]
    pub tenant: Option<String>,
    pub model: String,
    /// Members.
    pub prefill: String,
    pub decode: String,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub completion_tokens: u32,
    /// Of choice 0: from the request's arrival to its first token written to the client.
    pub ttft_ms: Option<f64>,
    /// From there to its second.
    pub second_token_ms: Option<f64>,
    pub total_ms: f64,
    pub code: u16,
    /// Placements tried, of choice 0, and moves to other workers.
    pub attempts: u32,
    pub migrations: u32,
    pub parts: Vec<Part>,
    pub unexplained_ms: Unexplained,
}

/// A stretch of the time until a token. Several attempts are added up.
#[derive(Clone, Debug, Serialize)]
pub struct Part {
    pub name: &'static str,
    /// Who spent it: `gateway`, `router`, `prefill`, `decode`, or `network` for what lies between them.
    pub service: &'static str,
    pub of: &'static str,
    pub ms: f64,
    /// From the request's arrival, with the parts laid end to end.
    pub start_ms: f64,
}

/// What is left of the whole.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Unexplained {
    pub ttft: Option<f64>,
    pub second_token: Option<f64>,
}

/// What a request has been measured to take so far.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub tenant: Option<String>,
    pub model: String,
    pub started: Started,
    pub first: Option<Latency>,
    pub second: Option<Latency>,
    pub attempts: u32,
    pub migrations: u32,
}

impl Measured {
    pub fn record(
        &self,
        request_id: &str,
        trace_id: String,
        usage: Usage,
        code: u16,
        total: Duration,
    ) -> Record {
        let ttft_ms = self.first.as_ref().map(|latency| ms(latency.own_ns as i64));
        let first = parts(self.first.as_ref(), "ttft", 0.0);
        let second = parts(self.second.as_ref(), "second_token", ttft_ms.unwrap_or_default());
        Record {
            request_id: request_id.to_owned(),
            trace_id,
            tenant: self.tenant.clone(),
            model: self.model.clone(),
            prefill: self.started.prefill_member.clone(),
            decode: self.started.decode_member.clone(),
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            ttft_ms,
            second_token_ms: self.second.as_ref().map(|latency| ms(latency.own_ns as i64)),
            total_ms: ms(total.as_nanos() as i64),
            code,
            attempts: self.attempts,
            migrations: self.migrations,
            parts: first.into_iter().chain(second).collect(),
            unexplained_ms: Unexplained {
                ttft: self.first.as_ref().map(|latency| ms(latency.unexplained_ns())),
                second_token: self.second.as_ref().map(|latency| ms(latency.unexplained_ns())),
            },
        }
    }
}

fn parts(latency: Option<&Latency>, of: &'static str, mut start_ms: f64) -> Vec<Part> {
    let mut parts: Vec<_> = latency.map(|latency| latency.parts.clone()).unwrap_or_default();
    parts.sort_by_key(|part| (part.name, order(part.place())));
    let one = |part: &proto::Part| {
        let (name, place): (PartName, Place) = (part.name(), part.place());
        let part = Part { name: name.label(), service: place.label(), of, ms: ms(part.ns), start_ms };
        start_ms = ms(((start_ms + part.ms) * 1e6) as i64);
        part
    };
    parts.iter().map(one).collect()
}

/// As a token comes back.
fn order(place: Place) -> u32 {
    match place {
        Place::Prefill | Place::Decode | Place::Unspecified => 0,
        Place::Network => 1,
        Place::Router => 2,
        Place::Gateway => 3,
    }
}

/// In whole microseconds.
fn ms(ns: i64) -> f64 {
    (ns as f64 / 1e3).round() / 1e3
}

/// Records that are kept.
const KEPT: usize = 256;

/// The last requests that ended; a request id that came twice names the later one.
#[derive(Debug, Default)]
pub struct Records(Mutex<VecDeque<Arc<Record>>>);

impl Records {
    pub fn keep(&self, record: Record) {
        let mut records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == KEPT {
            records.pop_front();
        }
        records.push_back(Arc::new(record));
    }

    /// Ids are the clients' own, so two may have the same: the last one that may be `shown`.
    pub fn find(&self, request_id: &str, shown: impl Fn(&Record) -> bool) -> Option<Arc<Record>> {
        let records = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().rev().find(|record| record.request_id == request_id && shown(record)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(name: PartName, place: Place, ns: i64) -> proto::Part {
        proto::Part { name: name as i32, place: place as i32, ns }
    }

    fn record(request_id: &str, measured: &Measured) -> Record {
        measured.record(request_id, "t".into(), Usage::default(), 200, Duration::from_millis(9))
    }

    #[test]
    fn parts_lie_end_to_end_in_the_order_in_which_they_come() {
        let first = Latency {
            own_ns: 6_000_000,
            parts: vec![
                part(PartName::Prefill, Place::Prefill, 3_000_000),
                part(PartName::WayBack, Place::Gateway, 250_000),
                part(PartName::WayBack, Place::Network, 750_000),
                part(PartName::Gateway, Place::Gateway, 1_900_000),
            ],
            ..Latency::default()
        };
        let second = Latency {
            own_ns: 500_000,
            parts: vec![part(PartName::Decode, Place::Decode, 500_000)],
            ..Latency::default()
        };
        let measured = Measured { first: Some(first), second: Some(second), ..Measured::default() };
        let record = record("r", &measured);
        let shown: Vec<_> = record.parts.iter().map(|p| (p.name, p.service, p.start_ms)).collect();
        let expected = [
            ("gateway", "gateway", 0.0),
            ("prefill", "prefill", 1.9),
            ("way_back", "network", 4.9),
            ("way_back", "gateway", 5.65),
            ("decode", "decode", 6.0),
        ];
        assert_eq!(shown, expected);
        assert_eq!((record.unexplained_ms.ttft, record.unexplained_ms.second_token), (Some(0.1), Some(0.0)));
    }

    #[test]
    fn the_last_ones_are_kept() {
        let records = Records::default();
        for n in 0..KEPT + 2 {
            records.keep(Record {
                migrations: n as u32,
                ..record(&format!("r{}", n.max(2)), &Measured::default())
            });
        }
        assert!(records.find("r1", |_| true).is_none());
        assert_eq!(records.find("r2", |_| true).unwrap().migrations, 2, "the later of two");
        assert_eq!(records.find(&format!("r{}", KEPT + 1), |_| true).unwrap().migrations, KEPT as u32 + 1);
    }
}
