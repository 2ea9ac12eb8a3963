//! The routers. A request goes to the one that answered last; if it cannot be reached, or goes away before
//! its first event, the next is asked. When one is lost in the middle of an answer, another goes on from there.

use crate::Error;
use crate::cluster::Seen;
use crate::config::{Timeouts, ms};
use futures::{StreamExt, stream::FuturesUnordered};
use proto::generate_event::Event;
use proto::router_client::RouterClient;
use proto::{Dial, ErrorCode, GenerateEvent, GenerateRequest, Latency, StatusReply, StatusRequest};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use telemetry::Counter;
use telemetry::trace::{self, TraceContext};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

pub struct Upstream {
    routers: Vec<Router>,
    preferred: AtomicUsize,
    silence: Duration,
    resume: Duration,
    resumed: Counter,
}

/// A router's answer as it comes.
pub struct Events {
    stream: Streaming<GenerateEvent>,
    router: usize,
    /// When this router was asked.
    pub asked: Instant,
    /// Others were asked before, in vain.
    pub retried: bool,
}

/// An event, and where its time went.
pub type Heard = (Event, Option<Latency>);

/// Why an answer does not go on.
pub enum Break {
    /// The router is gone; what it was told and has told is all that is needed to go on elsewhere.
    Lost(String),
    Failed(proto::Error),
}

struct Router {
    address: String,
    client: RouterClient<Channel>,
}

/// Why one router gave no stream.
enum Failure {
    /// Another router may do.
    Unreachable(String),
    /// One that had taken the request went away.
    Lost(String),
    Refused(proto::Error),
}

/// A status is quick to give.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);
/// For the others once one router has given its own: what it says is not kept waiting for one that is silent.
const OTHERS_TIMEOUT: Duration = Duration::from_millis(500);

/// Routers that one request may lose and still be given to another: it may be what kills them.
const LOSSES: u32 = 3;

/// Routers that had taken a request, and went away with it.
#[derive(Debug, Default)]
pub struct Losses(u32);

impl Losses {
    pub fn count(&mut self) {
        self.0 += 1;
    }

    /// No other router may be lost to it.
    pub fn too_many(&self) -> bool {
        self.0 > LOSSES
    }
}

/// Between looks for a router that goes on with an answer.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Upstream {
    /// Connects when first used.
    pub fn new(
        addresses: &[String],
        timeouts: &Timeouts,
        dial: &Dial,
        resumed: Counter,
    ) -> Result<Self, Error> {
        let routers: Result<_, _> =
            addresses.iter().map(|address| Router::new(address, timeouts, dial)).collect();
        let (silence, resume) = (ms(timeouts.silence_ms), ms(timeouts.resume_ms));
        Ok(Upstream { routers: routers?, preferred: AtomicUsize::new(0), silence, resume, resumed })
    }

    /// The first event that is no heartbeat, and the stream of the others.
    pub async fn open(
        &self,
        request: &GenerateRequest,
        trace: &TraceContext,
        losses: &mut Losses,
    ) -> Result<(Heard, Events), proto::Error> {
        match self.open_anywhere(request, trace, losses).await {
            Err(Failure::Lost(problem)) => self.resume(request, trace, losses, &problem).await,
            other => other.map_err(Failure::into),
        }
    }

    /// The same for a request that a router had taken: waits a while for another. `lost`: what became of the former.
    pub async fn resume(
        &self,
        request: &GenerateRequest,
        trace: &TraceContext,
        losses: &mut Losses,
        lost: &str,
    ) -> Result<(Heard, Events), proto::Error> {
        let deadline = Instant::now() + self.resume;
        if losses.too_many() {
            return Err(given_up(lost));
        }
        loop {
            let problem = match self.open_anywhere(request, trace, losses).await {
                Err(Failure::Unreachable(problem) | Failure::Lost(problem)) => problem,
                Err(refused) => return Err(refused.into()),
                Ok((first, events)) => {
                    self.resumed.inc();
                    return Ok((first, Events { retried: true, ..events }));
                }
            };
            if losses.too_many() {
                return Err(given_up(&problem));
            }
            if Instant::now() > deadline {
                let message = format!("the request's router was lost ({lost}), and {problem}");
                return Err(proto::Error::new(ErrorCode::NoMembers, message));
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    async fn open_anywhere(
        &self,
        request: &GenerateRequest,
        trace: &TraceContext,
        losses: &mut Losses,
    ) -> Result<(Heard, Events), Failure> {
        let (mut problems, mut lost) = (Vec::new(), false);
        for index in self.order() {
            if losses.too_many() {
                break;
            }
            let asked = Instant::now();
            match self.open_at(&self.routers[index], request, trace).await {
                Ok((first, stream)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    let retried = !problems.is_empty();
                    return Ok((first, Events { stream, router: index, asked, retried }));
                }
                Err(Failure::Unreachable(problem)) => problems.push(self.unreachable(index, problem)),
                Err(Failure::Lost(problem)) => {
                    lost = true;
                    losses.count();
                    problems.push(self.unreachable(index, problem));
                }
                Err(refused) => return Err(refused),
            }
        }
        let problem = format!("no router answers: {}", problems.join("; "));
        Err(if lost { Failure::Lost(problem) } else { Failure::Unreachable(problem) })
    }

    /// The cluster as all routers see it, asked at the same time.
    pub async fn statuses(&self) -> Result<Seen, proto::Error> {
        let order: Vec<usize> = self.order().collect();
        let mut answers = self.answers(&order).await;
        let (mut answering, mut silent) = (Vec::new(), Vec::new());
        for index in order {
            let address = self.routers[index].address.clone();
            match answers.remove(&index) {
                Some(Ok(status)) => answering.push((address, status)),
                Some(Err(problem)) => silent.push((address, problem)),
                None => silent.push((address, "no answer in time".into())),
            }
        }
        let problems: Vec<String> =
            silent.iter().map(|(address, problem)| format!("{address}: {problem}")).collect();
        Seen::new(answering, silent).ok_or_else(|| nobody(&problems))
    }

    /// What routers answer in time, by index.
    async fn answers(&self, order: &[usize]) -> HashMap<usize, Result<StatusReply, String>> {
        let asked = order.iter().map(|index| async { (*index, self.routers[*index].status().await) });
        let mut asked: FuturesUnordered<_> = asked.collect();
        let (mut answers, mut until) = (HashMap::new(), Instant::now() + STATUS_TIMEOUT);
        while let Ok(Some((index, answer))) = timeout_at(until, asked.next()).await {
            if answer.is_ok() {
                until = until.min(Instant::now() + OTHERS_TIMEOUT);
            }
            answers.insert(index, answer);
        }
        answers
    }

    /// The next event that is no heartbeat.
    pub async fn next(&self, events: &mut Events) -> Result<Heard, Break> {
        let problem = match self.hear(&mut events.stream).await {
            Ok(Some((Event::Error(error), _))) if error.code() == ErrorCode::Draining => error.message,
            Ok(Some(heard)) => return Ok(heard),
            Ok(None) => "it closed the stream".into(),
            Err(status) if spoken(&status) => return Err(Break::Failed(status.into())),
            Err(status) => describe(&status),
        };
        // Others need not find out for themselves.
        let (here, next) = (events.router, (events.router + 1) % self.routers.len());
        let _ = self.preferred.compare_exchange(here, next, Ordering::Relaxed, Ordering::Relaxed);
        Err(Break::Lost(self.unreachable(here, problem)))
    }

    /// `None` at the end of the stream.
    async fn hear(&self, events: &mut Streaming<GenerateEvent>) -> Result<Option<Heard>, Status> {
        loop {
            let message =
                timeout(self.silence, events.message()).await.map_err(|_| silent(self.silence))??;
            match message.map(|message| (message.event, message.latency)) {
                Some((Some(Event::Heartbeat(_)), _)) => continue,
                Some((Some(event), latency)) => return Ok(Some((event, latency))),
                Some((None, _)) => {
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
    ) -> Result<(Heard, Streaming<GenerateEvent>), Failure> {
        let mut call = tonic::Request::new(request.clone());
        trace::inject(trace, call.metadata_mut());
        let mut client = router.client.clone();
        let reply = timeout(self.silence, client.generate(call))
            .await
            .map_err(|_| Failure::from(silent(self.silence)))?;
        let mut events = reply?.into_inner();
        match self.hear(&mut events).await {
            Ok(Some((Event::Error(error), _))) => Err(refused(error)),
            Ok(Some(first)) => Ok((first, events)),
            Ok(None) => Err(Failure::Lost("closed the stream before any event".into())),
            Err(status) if spoken(&status) => Err(refused(status.into())),
            Err(status) => Err(Failure::Lost(describe(&status))),
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
        let endpoint = dial
            .events(address)
            .map_err(problem)?
            .connect_timeout(ms(timeouts.connect_ms))
            .http2_keep_alive_interval(ms(timeouts.silence_ms))
            .keep_alive_timeout(ms(timeouts.silence_ms));
        let client = RouterClient::new(dial.channel(&endpoint))
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        Ok(Router { address: address.to_owned(), client })
    }

    async fn status(&self) -> Result<StatusReply, String> {
        let answer = self.client.clone().status(StatusRequest {}).await;
        answer.map(Response::into_inner).map_err(|status| describe(&status))
    }
}

fn nobody(problems: &[String]) -> proto::Error {
    proto::Error::new(ErrorCode::NoMembers, format!("no router answers: {}", problems.join("; ")))
}

impl From<Failure> for proto::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Unreachable(problem) | Failure::Lost(problem) => {
                proto::Error::new(ErrorCode::NoMembers, problem)
            }
            Failure::Refused(error) => error,
        }
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

/// The request may be what kills them.
fn given_up(problem: &str) -> proto::Error {
    let message =
        format!("more than {LOSSES} routers were lost while they had this request; the last: {problem}");
    proto::Error::new(ErrorCode::WorkerLost, message)
}

fn describe(status: &Status) -> String {
    let cause = std::error::Error::source(status).map(|cause| format!(" ({cause})")).unwrap_or_default();
    format!("{}{cause}", status.message())
}

fn silent(after: Duration) -> Status {
    Status::unavailable(format!("silent for {} s", after.as_secs_f32()))
}
