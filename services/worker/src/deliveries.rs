//! The hand-off service: leads each delivery stream to the reservation that it names.

use crate::shared::Shared;
use handoff::{receive::Inbox, serve};
use proto::{DeliverMessage, DeliverReply};
use std::{sync::Arc, time::Duration};
use telemetry::trace;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

#[derive(Clone)]
pub struct HandoffService(pub Arc<Shared>);

impl serve::Reservations for Shared {
    fn inbox(&self, reservation: u64) -> Option<Inbox> {
        self.reservations.get(reservation)
    }

    fn heartbeat(&self) -> proto::Heartbeat {
        Shared::heartbeat(self)
    }
}

#[tonic::async_trait]
impl proto::handoff_server::Handoff for HandoffService {
    type DeliverStream = ReceiverStream<Result<DeliverReply, Status>>;

    async fn deliver(
        &self,
        request: Request<Streaming<DeliverMessage>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let span = trace::span("deliver", &trace::extract(request.metadata()), "");
        let silence = Duration::from_millis(self.0.config.liveness.silence_ms);
        let _entered = span.enter();
        let replies = serve::serve(request.into_inner(), self.0.clone(), self.0.heartbeat_every(), silence);
        Ok(Response::new(replies))
    }
}
