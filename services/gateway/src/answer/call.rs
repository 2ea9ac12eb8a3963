//! One call to the router, for one choice: its events as steps of text. Dropping the stream cancels the
//! sequence everywhere; so does a stop string, at once. The request always holds the tokens so far: should its
//! router be lost, another goes on with it, and the client sees nothing but a pause.

use super::choice::{self, Choice, Scored, Step};
use super::generation::Event;
use super::upstream::{Break, Events, Heard, Losses, Upstream};
use crate::observe::Observation;
use futures::Stream;
use proto::generate_event::Event as Reply;
use proto::{ErrorCode, GenerateRequest, PromptLogprob, Token};
use std::collections::VecDeque;
use std::sync::Arc;
use telemetry::trace::TraceContext;

pub struct Call {
    pub upstream: Arc<Upstream>,
    pub trace: TraceContext,
    pub request: GenerateRequest,
    pub choice: Choice,
    /// The prompt as this choice's text begins with it, if it is to.
    pub echo: Option<Echo>,
    /// Where the time of its first tokens is written down, if that is wanted of this choice.
    pub observation: Option<Arc<Observation>>,
}

/// An echoed prompt: its text, and its tokens where logprobs are asked for.
pub struct Echo {
    pub step: Step,
    /// Tokens whose logprob the router still owes; 0 for choices that have them from choice 0.
    pub owed: usize,
}

impl Call {
    pub fn stream(self) -> impl Stream<Item = Result<Event, proto::Error>> + Send {
        let running = Running {
            call: self,
            events: None,
            ready: VecDeque::new(),
            started: false,
            losses: Losses::default(),
            resumed: false,
            over: false,
        };
        futures::stream::unfold(running, |mut running| async move {
            let item = running.next().await?;
            running.over |= item.is_err();
            Some((item, running))
        })
    }
}

struct Running {
    call: Call,
    /// `None` before the call is open and after its end.
    events: Option<Events>,
    ready: VecDeque<Event>,
    /// A router has placed it.
    started: bool,
    losses: Losses,
    /// Another router has gone on with it.
    resumed: bool,
    over: bool,
}

impl Running {
    async fn next(&mut self) -> Option<Result<Event, proto::Error>> {
        while self.ready.is_empty() && !self.over {
            if let Err(error) = self.advance().await {
                return Some(Err(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }

    async fn advance(&mut self) -> Result<(), proto::Error> {
        let Some(events) = &mut self.events else { return self.open().await };
        match self.call.upstream.next(events).await {
            Ok(reply) => self.take(reply),
            Err(Break::Failed(error)) => Err(error),
            Err(Break::Lost(problem)) => self.resume(problem).await,
        }
    }

    async fn resume(&mut self, lost: String) -> Result<(), proto::Error> {
        self.events = None;
        self.losses.count();
        self.resumed = true;
        let Call { upstream, request, trace, .. } = &self.call;
        let resumed = upstream.resume(request, trace, &mut self.losses, &lost).await;
        let (first, events) = resumed.map_err(in_the_middle)?;
        self.opened(events);
        self.take(first)
    }

    async fn open(&mut self) -> Result<(), proto::Error> {
        self.observe(Observation::ready);
        let Call { upstream, request, trace, .. } = &self.call;
        let (first, events) = upstream.open(request, trace, &mut self.losses).await?;
        self.opened(events);
        self.take(first)
    }

    fn opened(&mut self, events: Events) {
        self.observe(|observation| observation.asked(events.asked, events.retried || self.resumed));
        self.events = Some(events);
    }

    fn observe(&self, observe: impl FnOnce(&Observation)) {
        if let Some(observation) = &self.call.observation {
            observe(observation);
        }
    }

    fn take(&mut self, (reply, latency): Heard) -> Result<(), proto::Error> {
        if matches!(reply, Reply::Token(_) | Reply::Finished(_) | Reply::Error(_)) {
            self.observe(|observation| observation.heard(latency.as_ref(), matches!(reply, Reply::Token(_))));
        }
        match reply {
            Reply::Started(_) if std::mem::replace(&mut self.started, true) => {}
            Reply::Started(started) => {
                self.ready.push_back(Event::Started(started));
                self.echo_if_complete();
            }
            Reply::PromptLogprob(logprob) => self.prompt_logprob(logprob)?,
            Reply::Token(token) => self.token(&token)?,
            Reply::Finished(finished) => {
                self.whole_prompt()?;
                let step = self.call.choice.finish(finished.reason(), finished.stop_token);
                self.step(step);
            }
            Reply::Error(error) => return Err(error),
            Reply::Heartbeat(_) => {}
        }
        Ok(())
    }

    fn token(&mut self, token: &Token) -> Result<(), proto::Error> {
        self.whole_prompt()?;
        let expected = self.sequence_len() + self.call.choice.sampled();
        if token.position != expected {
            let position = token.position;
            return Err(internal(format!(
                "the router sent token {position} of the sequence where {expected} was due"
            )));
        }
        self.record(token.id);
        let step = self.call.choice.token(token);
        self.step(step);
        Ok(())
    }

    /// Prompt logprobs come before the first token: they are not asked for again.
    fn record(&mut self, token: u32) {
        let Some(sequence) = &mut self.call.request.sequence else { return };
        sequence.tokens.push(token);
        if let Some(sampling) = &mut sequence.sampling {
            sampling.prompt_logprobs = None;
        }
    }

    fn step(&mut self, step: Step) {
        self.over = step.finish.is_some();
        if self.over {
            self.events = None;
        }
        self.ready.push_back(Event::Step(step));
    }

    fn prompt_logprob(&mut self, logprob: PromptLogprob) -> Result<(), proto::Error> {
        let Some(echo) = &mut self.call.echo else {
            // The next router begins the prompt anew.
            if self.resumed {
                return Ok(());
            }
            return Err(internal("the router sent prompt logprobs nobody asked for"));
        };
        if self.resumed && echo.has(logprob.position) {
            return Ok(());
        }
        echo.add(logprob)?;
        self.echo_if_complete();
        Ok(())
    }

    fn echo_if_complete(&mut self) {
        if let Some(echo) = self.call.echo.take_if(|echo| echo.owed == 0) {
            self.ready.push_back(Event::Echo(echo.step));
        }
    }

    /// Prompt logprobs come before the first token, or never.
    fn whole_prompt(&self) -> Result<(), proto::Error> {
        match &self.call.echo {
            Some(echo) => {
                Err(internal(format!("the router still owes the logprobs of {} prompt tokens", echo.owed)))
            }
            None => Ok(()),
        }
    }

    fn sequence_len(&self) -> u32 {
        self.call.request.sequence.as_ref().map_or(0, |sequence| sequence.prompt_len)
    }
}

impl Echo {
    /// `tokens`: the prompt with text offsets and no logprobs yet; empty if none are asked for.
    pub fn new(text: String, tokens: Vec<Scored>) -> Self {
        let owed = tokens.len().saturating_sub(1);
        Echo { step: Step { text, tokens, ..Step::default() }, owed }
    }

    fn has(&self, position: u32) -> bool {
        self.step.tokens.get(position as usize).is_some_and(|scored| scored.logprob.is_some())
    }

    fn add(&mut self, logprob: PromptLogprob) -> Result<(), proto::Error> {
        let position = logprob.position as usize;
        let fresh = |scored: &&mut Scored| position > 0 && scored.logprob.is_none();
        match (self.step.tokens.get_mut(position).filter(fresh), logprob.logprob) {
            (Some(scored), Some(own)) if own.token == scored.id => {
                scored.logprob = Some(choice::floor(own.logprob));
                scored.top = choice::top(&logprob.top);
                self.owed -= 1;
                Ok(())
            }
            _ => Err(internal(format!(
                "the router sent a prompt logprob for position {position} that does not belong there"
            ))),
        }
    }
}

/// An answer that has begun cannot be asked for again.
fn in_the_middle(error: proto::Error) -> proto::Error {
    match error.code() {
        ErrorCode::NoMembers => proto::Error::new(ErrorCode::WorkerLost, error.message),
        _ => error,
    }
}

fn internal(problem: impl Into<String>) -> proto::Error {
    proto::Error::new(ErrorCode::Internal, problem)
}
