//! All choices of a request, merged as they grow. Choice 0 of each prompt starts first; the others when its
//! first token is there, for by then the prompt is in the prefix caches and costs them nothing.
//! Dropping this cancels everything.

use super::call::{Call, Echo};
use super::choice::{Choice, Scored, Step};
use super::plan::Plan;
use super::upstream::Upstream;
use crate::error::from_router;
use crate::model::Model;
use crate::observe::Observation;
use crate::text::Detokenizer;
use futures::stream::{BoxStream, SelectAll, StreamExt};
use openai::{Error, Usage};
use proto::{GenerateRequest, Started};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Debug)]
pub enum Event {
    /// Placed: the first event of a choice.
    Started(Started),
    /// The prompt, ahead of the completion.
    Echo(Step),
    Step(Step),
}

/// Resolves with the reason why a request must end now: its time is over, the gateway stops.
pub type Interrupt = Pin<Box<dyn Future<Output = Error> + Send>>;

/// What a generation needs of its surroundings.
pub struct Setting {
    pub model: Arc<Model>,
    pub upstream: Arc<Upstream>,
    /// All but the sequence.
    pub request: GenerateRequest,
    /// Ids of sequences begin with this.
    pub sequence_id: String,
    pub retry_after: Duration,
    pub observation: Arc<Observation>,
    pub interrupt: Interrupt,
}

pub struct Generation {
    plan: Plan,
    setting: Setting,
    calls: SelectAll<BoxStream<'static, (u32, Result<Event, proto::Error>)>>,
    /// Of each prompt, what its choices share.
    prompts: Vec<Shared>,
    usage: Usage,
    over: bool,
}

#[derive(Clone, Default)]
struct Shared {
    placed: bool,
    others_started: bool,
    echo: Option<Step>,
}

impl Generation {
    pub fn new(plan: Plan, setting: Setting) -> Self {
        let usage = Usage { prompt_tokens: plan.prompt_tokens(), ..Usage::default() };
        let prompts = vec![Shared::default(); plan.prompts.len()];
        let mut generation =
            Generation { plan, setting, calls: SelectAll::new(), prompts, usage, over: false };
        for prompt in 0..generation.prompts.len() {
            generation.start(prompt, 0);
        }
        generation
    }

    /// The next event of any choice, by its index; `None` when all have finished, or after an error.
    pub async fn next(&mut self) -> Option<Result<(u32, Event), Error>> {
        if self.over {
            return None;
        }
        let item = tokio::select! {
            biased;
            error = &mut self.setting.interrupt => return Some(Err(self.fail(error))),
            item = self.calls.next() => item,
        };
        match item {
            Some((index, Ok(event))) => {
                self.account(index, &event);
                Some(Ok((index, event)))
            }
            Some((_, Err(error))) => {
                let error = from_router(&error, self.setting.retry_after);
                Some(Err(self.fail(error)))
            }
            None => {
                self.over = true;
                None
            }
        }
    }

    /// So far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Of all prompts together.
    pub fn choices(&self) -> usize {
        self.prompts.len() * self.plan.n as usize
    }

    fn fail(&mut self, error: Error) -> Error {
        self.over = true;
        self.calls = SelectAll::new();
        error
    }

    fn account(&mut self, index: u32, event: &Event) {
        let (prompt, choice) = ((index / self.plan.n) as usize, index % self.plan.n);
        match event {
            Event::Started(started) if !self.prompts[prompt].placed => {
                self.prompts[prompt].placed = true;
                self.setting.observation.placed(started);
                self.usage.cached_tokens += started.cached_tokens;
            }
            Event::Echo(step) if choice == 0 && self.plan.n > 1 => {
                self.prompts[prompt].echo = Some(step.clone())
            }
            Event::Step(step) => {
                self.usage.completion_tokens += step.sampled;
                self.setting.observation.sampled(index, step.sampled);
                self.start_others(prompt);
            }
            Event::Started(_) | Event::Echo(_) => {}
        }
        self.setting.observation.used(self.usage);
    }

    fn start_others(&mut self, prompt: usize) {
        if !std::mem::replace(&mut self.prompts[prompt].others_started, true) {
            (1..self.plan.n).for_each(|choice| self.start(prompt, choice));
        }
    }

    fn start(&mut self, prompt: usize, choice: u32) {
        let index = prompt as u32 * self.plan.n + choice;
        let sequence = self.plan.sequence(prompt, choice, format!("{}.{index}", self.setting.sequence_id));
        let call = Call {
            upstream: self.setting.upstream.clone(),
            trace: self.setting.observation.trace,
            request: GenerateRequest { sequence: Some(sequence), ..self.setting.request.clone() },
            choice: self.choice(prompt),
            echo: self.echo(prompt),
            observation: (index == 0).then(|| self.setting.observation.clone()),
        };
        self.calls.push(call.stream().map(move |item| (index, item)).boxed());
    }

    fn choice(&self, prompt: usize) -> Choice {
        let planned = &self.plan.prompts[prompt];
        let echoed = planned.echo.as_ref().map_or(0, |text| text.chars().count());
        Choice::new(self.setting.model.clone(), self.plan.ends.clone(), &planned.tokens, echoed)
    }

    /// Choice 0 gets the prompt's logprobs from the router, the others from choice 0.
    fn echo(&self, prompt: usize) -> Option<Echo> {
        if let Some(step) = &self.prompts[prompt].echo {
            return Some(Echo { step: step.clone(), owed: 0 });
        }
        let text = self.plan.prompts[prompt].echo.clone()?;
        let tokens = if self.plan.scores_prompts() { self.unscored(prompt) } else { Vec::new() };
        Some(Echo::new(text, tokens))
    }

    /// A prompt's tokens with their places in its text.
    fn unscored(&self, prompt: usize) -> Vec<Scored> {
        let vocabulary = &self.setting.model.vocabulary;
        let mut detokenizer = Detokenizer::new(vocabulary, self.plan.ends.skip_special, &[]);
        let mut text = String::new();
        let mut offset = 0;
        let place = |id: &u32| {
            let scored = Scored { id: *id, logprob: None, top: Vec::new(), offset };
            text.clear();
            detokenizer.push(vocabulary, *id, &mut text);
            offset += text.chars().count();
            scored
        };
        self.plan.prompts[prompt].tokens.iter().map(place).collect()
    }
}
