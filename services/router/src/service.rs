//! The `Router` service: checks what a gateway asks, starts the request's life, and hands out its events.
//! Dropping the response ends the life at once, and with it everything the request holds.

use crate::{Shared, config, request::Life, status};
use futures::Stream;
use proto::{
    Error, ErrorCode, GenerateEvent, GenerateRequest, Heartbeat, Sequence, StatusReply, StatusRequest,
    generate_event::Event, router_server::Router,
};
use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};
use telemetry::trace::{extract, span};
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep, sleep},
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};
use tracing::Instrument;

/// Events that the gateway has not taken yet.
const EVENTS: usize = 32;

pub struct Service {
    pub shared: Arc<Shared>,
}

#[tonic::async_trait]
impl Router for Service {
    type GenerateStream = Events;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Events>, Status> {
        let trace = self.shared.spans.context(extract(request.metadata()));
        let mut request = request.into_inner();
        let sequence = checked(request.sequence.take())?;
        if self.shared.draining.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Draining, "the router is stopping").into());
        }
        let span = span("route", &trace, &sequence.request_id);
        let (sender, events) = mpsc::channel(EVENTS);
        let life = Life::new(self.shared.clone(), request, sequence, sender, trace);
        let life = AbortOnDropHandle::new(tokio::spawn(life.live().instrument(span)));
        let pace = config::ms(self.shared.config.liveness.heartbeat_ms);
        Ok(Response::new(Events { events, pace, beat: Box::pin(sleep(pace)), _life: life }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        Ok(Response::new(status::status(&self.shared)))
    }
}

fn checked(sequence: Option<Sequence>) -> Result<Sequence, Error> {
    let invalid = |message: &str| Err(Error::new(ErrorCode::InvalidRequest, message));
    let Some(sequence) = sequence else { return invalid("no sequence: set `sequence`") };
    let tokens = sequence.tokens.len();
    if tokens == 0 || sequence.prompt_len == 0 || sequence.prompt_len as usize > tokens {
        return invalid(
            "the prompt is empty or longer than `tokens`: prompt_len must be 1 to the number of tokens",
        );
    }
    if sequence.sampling.is_none() || sequence.stop.as_ref().is_none_or(|stop| stop.max_tokens == 0) {
        return invalid("`sampling` and `stop.max_tokens` (at least 1) must be set");
    }
    Ok(sequence)
}

/// A life's events, with a heartbeat whenever nothing else has flowed for a while.
pub struct Events {
    events: mpsc::Receiver<GenerateEvent>,
    pace: Duration,
    beat: Pin<Box<Sleep>>,
    _life: AbortOnDropHandle<()>,
}

impl Stream for Events {
    type Item = Result<GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = match self.events.poll_recv(context) {
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => return Poll::Ready(None),
            Poll::Pending => {
                std::task::ready!(self.beat.as_mut().poll(context));
                GenerateEvent { event: Some(Event::Heartbeat(Heartbeat::default())), latency: None }
            }
        };
        let next = Instant::now() + self.pace;
        self.beat.as_mut().reset(next);
        Poll::Ready(Some(Ok(event)))
    }
}
