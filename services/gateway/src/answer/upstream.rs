//! The routers. A request goes to the one that answered last; if it cannot be reached, or goes away before
//! its first event, the next is asked. Once an event has come, the request stays where it is.

use crate::Error;
use crate::config::{Timeouts, ms};
use proto::generate_event::Event;
use proto::router_client::RouterClient;
use proto::{Dial, ErrorCode, GenerateEvent, GenerateRequest, StatusReply, StatusRequest};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use telemetry::trace::{self, TraceContext};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

pub struct Upstream {
    routers: Vec<Router>,
    preferred: AtomicUsize,
    silence: Duration,
}

struct Router {
    address: String,
    client: RouterClient<Channel>,
}

/// Why one router gave no stream.
enum Failure {
    /// Another router may do.
    Unreachable(String),
    Refused(proto::Error),
}

/// A status is quick to give.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// A stream that nobody reads may not use up the connection for the others.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 16 << 20;

impl Upstream {
    /// Connects when first used.
    pub fn new(addresses: &[String], timeouts: &Timeouts, dial: &Dial) -> Result<Self, Error> {
        let routers: Result<_, _> =
            addresses.iter().map(|address| Router::new(address, timeouts, dial)).collect();
        Ok(Upstream { routers: routers?, preferred: AtomicUsize::new(0), silence: ms(timeouts.silence_ms) })
    }

    /// The first event that is no heartbeat, and the stream of the others.
    pub async fn open(
        &self,
        request: &GenerateRequest,
        trace: &TraceContext,
    ) -> Result<(Event, Streaming<GenerateEvent>), proto::Error> {
        let mut problems = Vec::new();
        for index in self.order() {
            match self.open_at(&self.routers[index], request, trace).await {
                Ok(opened) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(opened);
                }
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Unreachable(problem)) => problems.push(self.unreachable(index, problem)),
            }
        }
        Err(proto::Error::new(ErrorCode::NoMembers, format!("no router answers: {}", problems.join("; "))))
    }

    /// The cluster as some router sees it.
    pub async fn status(&self) -> Result<StatusReply, proto::Error> {
        let mut problems = Vec::new();
        for index in self.order() {
            let mut client = self.routers[index].client.clone();
            match timeout(STATUS_TIMEOUT, client.status(StatusRequest {})).await {
                Ok(Ok(reply)) => return Ok(reply.into_inner()),
                Ok(Err(status)) => {
                    problems.push(format!("{}: {}", self.routers[index].address, describe(&status)))
                }
                Err(_) => problems.push(format!("{}: no answer in time", self.routers[index].address)),
            }
        }
        Err(proto::Error::new(ErrorCode::NoMembers, format!("no router answers: {}", problems.join("; "))))
    }

    /// The next event that is no heartbeat; `None` at the end of the stream.
    pub async fn next(&self, events: &mut Streaming<GenerateEvent>) -> Result<Option<Event>, Status> {
        loop {
            let message =
                timeout(self.silence, events.message()).await.map_err(|_| silent(self.silence))??;
            match message.map(|message| message.event) {
                Some(Some(Event::Heartbeat(_))) => continue,
                Some(Some(event)) => return Ok(Some(event)),
                Some(None) => {
                    return Err(Status::internal("the router sent an empty event; are versions mixed?"));
                }
                None => return Ok(None),
            }
        }
    }

    async fn open_at(
        &self,
        router: &Router,
        request: &GenerateRequest,
        trace: &TraceContext,
    ) -> Result<(Event, Streaming<GenerateEvent>), Failure> {
        let mut call = tonic::Request::new(request.clone());
        trace::inject(trace, call.metadata_mut());
        let mut client = router.client.clone();
        let reply = timeout(self.silence, client.generate(call))
            .await
            .map_err(|_| Failure::from(silent(self.silence)))?;
        let mut events = reply?.into_inner();
        match self.next(&mut events).await? {
            Some(Event::Error(error)) => Err(refused(error)),
            Some(event) => Ok((event, events)),
            None => Err(Failure::Unreachable("closed the stream before any event".into())),
        }
    }

    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, len) = (self.preferred.load(Ordering::Relaxed), self.routers.len());
        (0..len).map(move |offset| (first + offset) % len)
    }

    fn unreachable(&self, index: usize, problem: String) -> String {
        let address = &self.routers[index].address;
        tracing::warn!(router = %address, %problem, "router does not answer");
        format!("{address}: {problem}")
    }
}

impl Router {
    fn new(address: &str, timeouts: &Timeouts, dial: &Dial) -> Result<Self, Error> {
        let problem = |problem: String| Error::RouterAddress { address: address.to_owned(), problem };
        let endpoint =
            Endpoint::from_shared(address.to_owned()).map_err(|error| problem(error.to_string()))?;
        if endpoint.uri().scheme_str() != Some("http") {
            return Err(problem("the scheme is not http".into()));
        }
        let endpoint = endpoint
            .connect_timeout(ms(timeouts.connect_ms))
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(ms(timeouts.silence_ms))
            .keep_alive_timeout(ms(timeouts.silence_ms));
        let client = RouterClient::new(dial.channel(&endpoint))
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        Ok(Router { address: address.to_owned(), client })
    }
}

/// A router that is going away sends new requests elsewhere; every other refusal is an answer.
fn refused(error: proto::Error) -> Failure {
    match error.code() {
        ErrorCode::Draining => Failure::Unreachable(error.message),
        _ => Failure::Refused(error),
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        if spoken(&status) { refused(status.into()) } else { Failure::Unreachable(describe(&status)) }
    }
}

/// Whether the router itself said this, rather than the transport about the router.
fn spoken(status: &Status) -> bool {
    status.metadata().contains_key("baton-code")
}

fn describe(status: &Status) -> String {
    let cause = std::error::Error::source(status).map(|cause| format!(" ({cause})")).unwrap_or_default();
    format!("{}{cause}", status.message())
}

fn silent(after: Duration) -> Status {
    Status::unavailable(format!("silent for {} s", after.as_secs_f32()))
}
