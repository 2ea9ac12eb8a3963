//! What delivery streams find here: the reservation that each names.

use crate::shared::Shared;
use handoff::{receive::Inbox, serve::Reservations};
use http::HeaderMap;
use std::time::Duration;
use telemetry::trace;
use tonic::metadata::MetadataMap;
use tracing::Span;

impl Reservations for Shared {
    fn inbox(&self, reservation: u64) -> Option<Inbox> {
        self.reservations.get(reservation)
    }

    fn heartbeat(&self) -> proto::Heartbeat {
        Shared::heartbeat(self)
    }

    fn heartbeat_every(&self) -> Duration {
        Shared::heartbeat_every(self)
    }

    fn silence(&self) -> Duration {
        Duration::from_millis(self.config.liveness.silence_ms)
    }

    fn span(&self, headers: &HeaderMap) -> Span {
        trace::span("deliver", &trace::extract(&MetadataMap::from_headers(headers.clone())), "")
    }
}
