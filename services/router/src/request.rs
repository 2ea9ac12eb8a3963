//! A request's life: waiting in the queue, reserving on a decode worker, then placed, and placed again
//! elsewhere when a worker is lost or out of blocks. Dropping it at any moment cancels everything it has
//! begun: its ticket, its credits and its calls are all guards.

use crate::{
    Shared,
    admission::{Ask, Offer, Permit, Ticket},
    call::{DecodeStream, Failure, Peer},
    cluster::Prompt,
    config,
    path::Path,
    placed::{Ending, Placed},
    policy::Wanted,
    queue::Place,
};
use proto::{
    DecodeEvent, DecodeStart, Error, ErrorCode, Finished, GenerateEvent, GenerateRequest, Latency, Member,
    PartName, Place as Spent, PromptLogprob, Sequence, Started, Token, generate_event::Event, latency::Meter,
};
use std::{sync::Arc, time::Duration};
use telemetry::{spans::Span, trace::TraceContext};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout, timeout_at},
};

pub struct Life {
    pub shared: Arc<Shared>,
    pub path: Path,
    client: mpsc::Sender<GenerateEvent>,
    trace: TraceContext,
    model: String,
    place: Place,
    timeout: Duration,
    permit: Option<Permit>,
    /// Placements that failed.
    failures: u32,
    /// Members they failed on, and until when not even the last of them is tried again.
    avoid: Vec<String>,
    shun_until: Option<Instant>,
    started: bool,
    /// Of the time until the first two tokens.
    pub meter: Meter,
    migrations: u32,
    arrival: Instant,
    /// How it ended.
    error: Option<String>,
    _alive: watch::Receiver<()>,
}

/// A place that is ours: the decode worker has said so.
pub struct Reserved {
    pub offer: Offer,
    pub decode: DecodeStream,
    /// What it said: `Reserved`, or `LocalPrefill` on a member of role both.
    pub first: DecodeEvent,
}

/// Why an offer came to nothing.
enum Refusal {
    /// No capacity after all: try elsewhere or later.
    Full,
    Failed(Failure),
    /// The client's deadline has passed.
    Late,
}

impl Life {
    pub fn new(
        shared: Arc<Shared>,
        request: GenerateRequest,
        sequence: Sequence,
        client: mpsc::Sender<GenerateEvent>,
        trace: TraceContext,
    ) -> Self {
        let timeout = match request.queue_timeout_ms {
            0 => shared.config.queue.timeout_ms,
            asked => asked.into(),
        };
        let (tenant, priority) = (request.tenant, sequence.priority);
        // Another router has begun it.
        let resumed = sequence.tokens.len() > sequence.prompt_len as usize;
        let arrival = Instant::now();
        Life {
            place: Place { tenant, priority, arrival, resumed },
            path: Path::new(sequence),
            model: request.model,
            timeout: config::ms(timeout),
            permit: None,
            failures: 0,
            avoid: Vec::new(),
            shun_until: None,
            started: false,
            meter: Meter::start(arrival),
            migrations: 0,
            arrival,
            error: None,
            _alive: shared.lives.subscribe(),
            shared,
            client,
            trace,
        }
    }

    /// Lives to the last event, which says how it ended.
    pub async fn live(mut self) {
        let last = match self.answer().await {
            Ok(finished) => Event::Finished(finished),
            Err(error) => {
                tracing::info!(code = error.code().as_str_name(), "{error}");
                self.error = Some(error.message.clone());
                Event::Error(error)
            }
        };
        let counts = self.counted(Latency::default());
        // Nothing runs any more, however long the client takes to read this.
        self.permit = None;
        let _ = self.send(last, Some(counts)).await;
    }

    async fn answer(&mut self) -> Result<Finished, Error> {
        loop {
            if let Some(finished) = self.path.ended() {
                return Ok(finished);
            }
            let reserved = self.reserve().await?;
            let before = (self.path.len(), self.failures);
            match Placed::new(self, reserved).run().await {
                Ending::Finished(finished) => return Ok(finished),
                Ending::Failed(error) => return Err(error),
                Ending::Elsewhere(cause) => {
                    self.meter.lap(PartName::Lost, Spent::Router);
                    self.migrate(cause);
                }
            }
            if before == (self.path.len(), self.failures) {
                self.fail(Error::new(ErrorCode::NoCapacity, "moved on without a token gained"))?;
            }
            self.place.resumed = true;
        }
    }

    /// Waits until a decode worker has reserved; the prefill credit is in hand by then.
    async fn reserve(&mut self) -> Result<Reserved, Error> {
        let mut ticket = self.queue(None).inspect_err(|_| self.shared.metrics.placement("rejected"))?;
        loop {
            let mut offer =
                ticket.offer().await.inspect_err(|_| self.shared.metrics.placement("rejected"))?;
            self.meter.lap(PartName::Queue, Spent::Router);
            let member = offer.grant.decode.member.clone();
            match self.open(&mut offer, ticket.deadline).await {
                Ok((decode, first)) => {
                    self.shared.metrics.placed(ticket.admit());
                    self.permit = self.permit.take().or(offer.permit.take());
                    return Ok(Reserved { offer, decode, first });
                }
                Err(Refusal::Full) => {
                    self.shared.metrics.placement("refused");
                    self.shared.cluster.refused(&member.id);
                }
                Err(Refusal::Failed(failure)) => self.blame(&member, &failure)?,
                Err(Refusal::Late) => return Err(ticket.expired()),
            }
            ticket.put_back(offer, self.wanted(None));
        }
    }

    /// Joins the queue; `pinned`: for a prefill member that suits this decode member.
    pub fn queue(&self, pinned: Option<&str>) -> Result<Ticket, Error> {
        let wanted = self.wanted(pinned);
        let runs = self.permit.is_some();
        let resumed = self.place.resumed || pinned.is_some();
        // One that ran has not waited meanwhile.
        let arrival = if runs { Instant::now() } else { self.place.arrival };
        let place = Place { resumed, arrival, ..self.place.clone() };
        let prompt = Arc::new(Prompt::new(&self.path.sequence().tokens));
        self.shared.admission.join(Ask { wanted, prompt, place, timeout: self.timeout, runs })
    }

    fn wanted(&self, pinned: Option<&str>) -> Wanted {
        Wanted {
            model: self.model.clone(),
            tokens: self.path.len(),
            total: self.path.total(),
            pinned: pinned.map(str::to_owned),
            avoid: self.avoid.clone(),
            shun_until: self.shun_until,
        }
    }

    async fn open(
        &mut self,
        offer: &mut Offer,
        deadline: Instant,
    ) -> Result<(DecodeStream, DecodeEvent), Refusal> {
        let here = offer.grant.prefill.member.id == offer.grant.decode.member.id;
        let opened = self.try_open(offer, here, deadline).await;
        // What prefills in this very call says itself where the time went.
        if !here || opened.is_err() {
            self.meter.lap(PartName::Reservation, Spent::Router);
        }
        opened
    }

    async fn try_open(
        &mut self,
        offer: &mut Offer,
        here: bool,
        deadline: Instant,
    ) -> Result<(DecodeStream, DecodeEvent), Refusal> {
        let grant = &mut offer.grant;
        let sequence = Some(self.path.sequence().clone());
        let peer = self.peer(&grant.decode.member).map_err(Refusal::Failed)?;
        let member = grant.decode.member.id.clone();
        let start = DecodeStart { sequence, prefill_here: here, forced: None, member };
        self.meter.lap(PartName::Reservation, Spent::Router);
        let mut decode = DecodeStream::open(peer, start);
        let first = timeout_at(deadline, decode.events.next()).await.map_err(|_| Refusal::Late)?;
        let first = first.map_err(|failure| match failure.error.code() {
            ErrorCode::NoCapacity | ErrorCode::Draining => Refusal::Full,
            _ => Refusal::Failed(failure),
        })?;
        grant.decode.confirm();
        self.shared.cluster.trust(&grant.decode.member.id);
        Ok((decode, first))
    }

    pub fn peer(&self, member: &Arc<Member>) -> Result<Peer, Failure> {
        let channel = self.shared.channels.get(&member.address).map_err(|error| Failure {
            error: Error::new(
                ErrorCode::WorkerLost,
                format!(
                    "worker {} has announced `{}`, which is no address here: {error}",
                    member.id, member.address
                ),
            ),
            lost: true,
        })?;
        let silence = config::ms(self.shared.config.liveness.silence_ms);
        Ok(Peer { member: member.clone(), channel, trace: self.trace, silence })
    }

    /// Counts a failed placement. An error ends the request: it cannot succeed elsewhere, or was tried often enough.
    pub fn blame(&mut self, member: &Member, failure: &Failure) -> Result<(), Error> {
        tracing::warn!(member = member.id, lost = failure.lost, "placement failed: {}", failure.error);
        self.shared.metrics.placement("failed");
        if failure.lost {
            self.shared.cluster.suspect(&member.id);
        }
        self.avoid(&member.id);
        self.fail(failure.error.clone())
    }

    /// Places this request on the member only if there is no other.
    pub fn avoid(&mut self, member: &str) {
        self.avoid.push(member.to_owned());
    }

    fn fail(&mut self, error: Error) -> Result<(), Error> {
        let pause =
            config::ms(self.shared.config.members.retry_ms).saturating_mul(1 << self.failures.min(10));
        self.shun_until = Some(Instant::now() + pause);
        self.failures += 1;
        if !error.code().is_retryable() {
            return Err(error);
        }
        if self.failures >= self.shared.config.attempts {
            let message = format!("gave up after {} failed placements; the last: {error}", self.failures);
            return Err(Error { message, ..error });
        }
        Ok(())
    }

    /// Counts a sequence that had a place and goes on in another.
    pub fn migrate(&mut self, cause: &'static str) {
        self.migrations += 1;
        tracing::info!(cause, tokens = self.path.len(), "the sequence moves");
        self.shared.metrics.migration(cause);
    }

    /// Tells the client once that computing has begun.
    pub async fn started(&mut self, cached_tokens: u32, prefill: &str, decode: &str) -> Result<(), Error> {
        if std::mem::replace(&mut self.started, true) {
            return Ok(());
        }
        let (prefill_member, decode_member) = (prefill.to_owned(), decode.to_owned());
        let attempt = self.failures + 1;
        let started = Started { cached_tokens, prefill_member, decode_member, attempt };
        self.send(Event::Started(started), None).await
    }

    pub async fn prompt_logprob(&mut self, logprob: PromptLogprob) -> Result<(), Error> {
        if !self.path.prompt_logprob(logprob.position) {
            return Ok(());
        }
        self.send(Event::PromptLogprob(logprob), None).await
    }

    pub async fn token(&mut self, token: Token) -> Result<(), Error> {
        if let Err(violation) = self.path.token(&token) {
            self.shared.metrics.violation();
            return Err(Error::new(ErrorCode::Internal, violation.to_string()));
        }
        let latency = self.meter.token(Spent::Router).map(|latency| self.counted(latency));
        self.send(Event::Token(token), latency).await
    }

    fn counted(&self, latency: Latency) -> Latency {
        Latency { attempts: self.failures + 1, migrations: self.migrations, ..latency }
    }

    /// Waits for the client, but not for ever: it holds blocks on a worker meanwhile.
    async fn send(&self, event: Event, latency: Option<Latency>) -> Result<(), Error> {
        let patience = config::ms(self.shared.config.liveness.stalled_client_ms);
        let sent = self.client.send(GenerateEvent { event: Some(event), latency });
        match timeout(patience, sent).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Error::new(ErrorCode::Cancelled, "the client has left")),
            Err(_) => Err(Error::new(
                ErrorCode::Cancelled,
                format!("the client took no event for {:.0} s", patience.as_secs_f32()),
            )),
        }
    }
}

/// However it ends, its part of the trace is told.
impl Drop for Life {
    fn drop(&mut self) {
        let spans = &self.shared.spans;
        if !spans.wants(&self.trace) {
            return;
        }
        for lap in self.meter.laps() {
            spans.tell(Span::part(&self.trace, lap.name.label(), lap.from, lap.to).with("baton.of", lap.of));
        }
        spans.tell(Span {
            context: self.trace,
            name: "baton.v1.Router/Generate".into(),
            serves: true,
            from: self.arrival,
            to: Instant::now(),
            attributes: vec![
                ("baton.request_id", self.path.sequence().request_id.clone().into()),
                ("baton.attempts", i64::from(self.failures + 1).into()),
                ("baton.migrations", i64::from(self.migrations).into()),
            ],
            error: self.error.take(),
        });
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
