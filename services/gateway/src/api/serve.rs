//! A request from its first byte to its answer, the same for both endpoints.
//!
//! Headers of a stream wait for the router's first event, so that whatever goes wrong before is an HTTP
//! error with the right status. Only when that takes long do they go first, to keep proxies patient.

use super::identity::Identity;
use super::shape::Shape;
use super::stream::{Events, Heading, WithRecord};
use super::{access, body, reply};
use crate::answer::{Event, Generation, Interrupt, Plan, Setting, Step};
use crate::config::ms;
use crate::gateway::Gateway;
use crate::keys::{Caller, Lease};
use crate::observe::Observation;
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use openai::{Code, Error, Parameters};
use proto::{GenerateRequest, Started};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::Instrument;
use uuid::Uuid;

const PREFILL: HeaderName = HeaderName::from_static("x-baton-prefill");
const DECODE: HeaderName = HeaderName::from_static("x-baton-decode");
const ATTEMPT: HeaderName = HeaderName::from_static("x-baton-attempt");
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Bodies above this are parsed and tokenised away from the threads that stream.
const LARGE: usize = 8 << 10;
/// The longest that such a body waits for others to be read.
const TURN: Duration = Duration::from_secs(30);

pub async fn serve<S: Shape>(
    State(gateway): State<Arc<Gateway>>,
    Extension(identity): Extension<Identity>,
    Extension(caller): Extension<Option<Caller>>,
    request: Request,
) -> Response {
    let (refused, lease, place) = match admit(&gateway, caller.as_ref()) {
        Ok((lease, place)) => (None, lease, Some(place)),
        Err(error) => (Some(error), None, None),
    };
    let Identity { request_id, trace, tenant, wants_record } = identity;
    let trace = gateway.spans.context(trace);
    let span = telemetry::trace::span("gateway", &trace, &request_id);
    let observation = Observation::new(S::ENDPOINT, request_id, trace, gateway.clone(), place, lease);
    let observation = Arc::new(observation);
    let served = match refused {
        Some(error) => Err(error),
        None => {
            let tenant = caller.as_ref().map_or(tenant, |caller| caller.tenant.clone());
            let (observation, caller, start) = (observation.clone(), caller.clone(), Instant::now());
            let service =
                Service { gateway: gateway.clone(), observation, tenant, caller, wants_record, start };
            service.answer::<S>(request).instrument(span).await
        }
    };
    let mut response = served.unwrap_or_else(|error| {
        observation.end(error.code.status());
        tracing::debug!(request_id = %observation.request_id, %error, param = error.param, "refused");
        if let (Some(caller), 429) = (&caller, error.code.status()) {
            gateway.metrics.count_limited(&caller.tenant, error.code.kind());
        }
        reply::error(&error)
    });
    // A whole answer is over: what it did not use is given back before the headers say what is left.
    drop(observation);
    if let Some(caller) = &caller {
        access::mark(response.headers_mut(), &caller.standing());
    }
    response
}

/// The request's claim on the account of its key, and its place; both are held until it ends. The place first: when there is
/// none, that is not at the cost of the key.
fn admit(gateway: &Gateway, caller: Option<&Caller>) -> Result<(Option<Lease>, OwnedSemaphorePermit), Error> {
    gateway.check_files()?;
    let patience = ms(gateway.config.timeouts.retry_after_ms);
    let full = |_| gateway.overloaded("too many requests at the same time; try again shortly");
    let place = gateway.places.clone().try_acquire_owned().map_err(full)?;
    let lease = caller.map(|caller| caller.admit(patience)).transpose()?;
    Ok((lease, place))
}

struct Service {
    gateway: Arc<Gateway>,
    observation: Arc<Observation>,
    tenant: String,
    /// The record of the request is to be part of the answer.
    wants_record: bool,
    caller: Option<Caller>,
    start: Instant,
}

/// A request read, checked and planned.
struct Planned<S> {
    plan: Plan,
    parameters: Parameters,
    shape: S,
}

impl Service {
    async fn answer<S: Shape>(self, request: Request) -> Result<Response, Error> {
        let body = body::read(request, &self.gateway.config).await?;
        let Planned { plan, parameters, shape } = self.plan::<S>(body).await?;
        if !parameters.unknown.is_empty() {
            tracing::debug!(request_id = %self.observation.request_id, fields = ?parameters.unknown, "unknown fields ignored");
        }
        let tenant = self.caller.as_ref().map(|caller| caller.tenant.as_str());
        self.observation.asks(&parameters.model, tenant);
        let assumed = parameters.ending.max_tokens.is_none();
        let assumed = assumed.then_some(self.gateway.config.keys.assumed_output_tokens);
        self.observation.charge(plan.most_tokens(assumed))?;
        let heading = heading::<S>(parameters.model);
        let generation = Generation::new(plan, self.setting(&heading));
        match parameters.streaming {
            None => self.whole(generation, shape, &heading).await,
            Some(streaming) => {
                let mut events = Events {
                    generation,
                    shape,
                    heading,
                    streaming,
                    model: self.gateway.model.clone(),
                    keep_alive: ms(self.gateway.config.stream.keep_alive_ms),
                    observation: self.observation.clone(),
                    wants_record: self.wants_record,
                    first: None,
                    over: false,
                };
                events.first = self.first(&mut events.generation).await?;
                Ok(streamed(events, ms(self.gateway.config.timeouts.stalled_client_ms)))
            }
        }
    }

    /// CPU work: here if small, else on a thread of its own, of which there are few.
    async fn plan<S: Shape>(&self, body: Bytes) -> Result<Planned<S>, Error> {
        if body.len() <= LARGE {
            return plan(&self.gateway, self.caller.as_ref(), &body);
        }
        let (gateway, caller) = (self.gateway.clone(), self.caller.clone());
        let until = self.deadline().min(Instant::now() + TURN);
        let full =
            || gateway.overloaded("too many large requests to read at the same time; try again shortly");
        let place = turn(&gateway.tokenizers, until).await.ok_or_else(full)?;
        aside(place, move || plan(&gateway, caller.as_ref(), &body)).await
    }

    fn deadline(&self) -> Instant {
        self.start + ms(self.gateway.config.timeouts.request_ms)
    }

    fn setting(&self, heading: &Heading) -> Setting {
        let config = &self.gateway.config;
        let unique = &heading.id[heading.id.len() - 8..];
        Setting {
            model: self.gateway.model.clone(),
            upstream: self.gateway.upstream.clone(),
            request: GenerateRequest {
                sequence: None,
                model: config.worker_model.clone(),
                tenant: self.tenant.clone(),
                queue_timeout_ms: config.timeouts.queue_ms,
            },
            sequence_id: format!("{}~{unique}", self.observation.request_id),
            retry_after: ms(config.timeouts.retry_after_ms),
            observation: self.observation.clone(),
            interrupt: self.interrupt(),
        }
    }

    fn interrupt(&self) -> Interrupt {
        let limit = ms(self.gateway.config.timeouts.request_ms);
        let (deadline, gateway) = (self.deadline(), self.gateway.clone());
        let mut closing = gateway.closing.clone();
        Box::pin(async move {
            tokio::select! {
                () = sleep_until(deadline) => {
                    Error::new(Code::Deadline, format!("the request took longer than {} s", limit.as_secs_f32()))
                }
                Ok(_) = closing.wait_for(|closing| *closing) => gateway.overloaded("the gateway is stopping; try again"),
            }
        })
    }

    /// The first event, unless it takes so long that headers should go before it.
    async fn first(&self, generation: &mut Generation) -> Result<Option<(u32, Event)>, Error> {
        let next = match self.gateway.config.stream.commit_ms {
            0 => generation.next().await,
            commit => match timeout_at(Instant::now() + ms(commit), generation.next()).await {
                Ok(next) => next,
                Err(_) => return Ok(None),
            },
        };
        next.transpose()
    }

    async fn whole<S: Shape>(
        &self,
        mut generation: Generation,
        shape: S,
        heading: &Heading,
    ) -> Result<Response, Error> {
        let mut choices: Vec<Step> = vec![Step::default(); generation.choices()];
        let mut started = None;
        while let Some((index, event)) = generation.next().await.transpose()? {
            match event {
                Event::Started(first) => drop(started.get_or_insert(first)),
                Event::Echo(step) | Event::Step(step) => {
                    let sampled = step.sampled;
                    append(&mut choices[index as usize], step);
                    self.observation.written(index, sampled);
                }
            }
        }
        let model = &self.gateway.model;
        let choices = choices.into_iter().zip(0..).map(|(mut step, index)| {
            let finish = step.finish.take().ok_or_else(unfinished)?;
            Ok(shape.choice(model, index, step, finish))
        });
        let choices = choices.collect::<Result<Vec<_>, Error>>()?;
        let envelope = heading.envelope(S::OBJECT, &choices, Some(Some(generation.usage())));
        let baton = self.wants_record.then(|| self.observation.record(200));
        let mut response = reply::json(&WithRecord { envelope, baton });
        mark(&mut response, started.as_ref());
        self.observation.end(200);
        Ok(response)
    }
}

/// A place among those whose bodies are read aside, if there is one in time.
async fn turn(places: &Arc<Semaphore>, until: Instant) -> Option<OwnedSemaphorePermit> {
    timeout_at(until, places.clone().acquire_owned()).await.ok()?.ok()
}

/// Runs on a thread of its own. The place is the work's and not the asker's: a client that leaves does not
/// end the work, and may not make room for more of it.
async fn aside<T: Send + 'static>(
    place: OwnedSemaphorePermit,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(move || {
        let _place = place;
        work()
    });
    done.await.unwrap_or_else(|error| {
        Err(Error::new(Code::Internal, format!("reading the request failed: {error}")))
    })
}

fn plan<S: Shape>(gateway: &Gateway, caller: Option<&Caller>, body: &[u8]) -> Result<Planned<S>, Error> {
    let limits = &gateway.config.limits;
    let request = S::read(body, &limits.of_requests())?;
    gateway.check_model(&S::parameters(&request).model)?;
    let plan = S::plan(&request, &gateway.model, &gateway.bounds(caller))?;
    Ok(Planned { plan, parameters: S::parameters(&request).clone(), shape: S::new(&request) })
}

fn heading<S: Shape>(model: String) -> Heading {
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    Heading { id: format!("{}{}", S::ID, Uuid::new_v4().simple()), created, model }
}

fn append(choice: &mut Step, step: Step) {
    choice.text.push_str(&step.text);
    choice.tokens.extend(step.tokens);
    choice.finish = step.finish.or(choice.finish.take());
}

fn unfinished() -> Error {
    Error::new(Code::Internal, "the answer ended before all its choices did")
}

fn streamed<S: Shape>(events: Events<S>, patience: Duration) -> Response {
    let started = match &events.first {
        Some((_, Event::Started(started))) => Some(started.clone()),
        _ => None,
    };
    let mut response = Response::new(Body::from_stream(events.stream(patience)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    mark(&mut response, started.as_ref());
    response
}

/// Who did it: for tests and for operators with a complaint in hand.
fn mark(response: &mut Response, started: Option<&Started>) {
    let Some(started) = started else { return };
    let headers = response.headers_mut();
    for (name, member) in [(PREFILL, &started.prefill_member), (DECODE, &started.decode_member)] {
        if let Ok(value) = HeaderValue::from_str(member) {
            headers.insert(name, value);
        }
    }
    headers.insert(ATTEMPT, started.attempt.into());
}

#[cfg(test)]
mod tests {
    use super::super::completions::Completions;
    use super::*;
    use crate::Config;
    use proto::Dial;
    use std::path::Path;
    use std::sync::mpsc;
    use telemetry::{Registry, Spans};
    use tokio::sync::watch;
    use tokio::time::timeout;

    /// One that came just now to a gateway of one place for large bodies.
    fn service(request_ms: u64) -> Service {
        let model_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/checkpoint");
        let mut config = Config { model_dir, ..Config::default() };
        (config.limits.tokenizers, config.timeouts.request_ms) = (1, request_ms);
        let metrics = telemetry::gateway::Metrics::new(&mut Registry::default());
        let closing = watch::channel(false).1;
        let gateway =
            Arc::new(Gateway::new(config, &Dial::default(), (metrics, Spans::off()), closing).unwrap());
        let trace = gateway.spans.context(None);
        let observation = Observation::new("/v1/completions", "r".into(), trace, gateway.clone(), None, None);
        let (observation, start) = (Arc::new(observation), Instant::now());
        Service { gateway, observation, tenant: String::new(), wants_record: false, caller: None, start }
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_body_waits_no_longer_than_is_of_use() {
        for (request_ms, waits) in [(600_000, TURN), (2_000, Duration::from_secs(2))] {
            let service = service(request_ms);
            let _place = service.gateway.tokenizers.clone().acquire_owned().await.unwrap();
            let large = Bytes::from(vec![b' '; LARGE + 1]);
            let planned = timeout(2 * TURN, service.plan::<Completions>(large)).await;
            let error = planned.expect("an end to the wait").err().expect("nobody makes room");
            assert_eq!((error.code, service.start.elapsed()), (Code::Overloaded, waits));
            assert!(error.retry_after.is_some());
        }
    }

    #[tokio::test]
    async fn work_keeps_its_place_when_its_client_leaves() {
        let places = Arc::new(Semaphore::new(1));
        let (finish, finished) = mpsc::channel::<()>();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let place = places.clone().acquire_owned().await.unwrap();
        let asker = tokio::spawn(aside(place, move || {
            let _ = begun.send(());
            let _ = finished.recv();
            Ok(())
        }));
        has_begun.await.unwrap();
        asker.abort();
        assert!(asker.await.is_err_and(|error| error.is_cancelled()));
        assert_eq!(places.available_permits(), 0, "the work goes on");
        finish.send(()).unwrap();
        drop(places.acquire().await.unwrap());
    }
}
