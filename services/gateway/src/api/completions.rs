//! `POST /v1/completions`: how its choices look.

use super::logprobs;
use super::shape::Shape;
use crate::answer::{Bounds, Finish, Plan, Step};
use crate::model::Model;
use openai::{CompletionChoice, CompletionRequest, Error, Limits, Parameters};

pub struct Completions {
    /// Whether logprobs are asked for.
    logprobs: bool,
    tokens_as_ids: bool,
}

impl Shape for Completions {
    const ENDPOINT: &'static str = "/v1/completions";
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";
    const ID: &'static str = "cmpl-";
    type Request = CompletionRequest;
    type Choice = CompletionChoice;
    type Chunk = CompletionChoice;

    fn read(body: &[u8], limits: &Limits) -> Result<CompletionRequest, Error> {
        CompletionRequest::parse(body, limits)
    }

    fn parameters(request: &CompletionRequest) -> &Parameters {
        &request.parameters
    }

    fn plan(request: &CompletionRequest, model: &Model, bounds: &Bounds) -> Result<Plan, Error> {
        Plan::completions(request, model, bounds)
    }

    fn new(request: &CompletionRequest) -> Self {
        let parameters = &request.parameters;
        Completions {
            logprobs: parameters.sampling.logprobs.is_some(),
            tokens_as_ids: parameters.tokens_as_ids,
        }
    }

    fn opening(&self, _: u32) -> Option<CompletionChoice> {
        None
    }

    fn chunk(&self, model: &Model, index: u32, step: Step) -> CompletionChoice {
        let logprobs =
            self.logprobs.then(|| logprobs::completions(&model.vocabulary, &step.tokens, self.tokens_as_ids));
        CompletionChoice { index, text: step.text, logprobs, finish_reason: None, stop_reason: None }
    }

    fn ending(&self, index: u32, finish: Finish) -> CompletionChoice {
        let text = String::new();
        CompletionChoice {
            index,
            text,
            logprobs: None,
            finish_reason: Some(finish.reason),
            stop_reason: finish.stop,
        }
    }

    fn choice(&self, model: &Model, index: u32, step: Step, finish: Finish) -> CompletionChoice {
        let chunk = self.chunk(model, index, step);
        CompletionChoice { finish_reason: Some(finish.reason), stop_reason: finish.stop, ..chunk }
    }
}
