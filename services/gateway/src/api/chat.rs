//! `POST /v1/chat/completions`: how its choices look.

use super::logprobs;
use super::shape::Shape;
use crate::answer::{Bounds, Finish, Plan, Step};
use crate::model::Model;
use openai::{
    ChatChoice, ChatChunkChoice, ChatLogprobs, ChatRequest, Delta, Error, Limits, Parameters, ReplyMessage,
};

pub struct Chat {
    /// How many alternatives of each token to show; `None`: no logprobs.
    top: Option<u32>,
    tokens_as_ids: bool,
}

const ROLE: &str = "assistant";

impl Shape for Chat {
    const ENDPOINT: &'static str = "/v1/chat/completions";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";
    const ID: &'static str = "chatcmpl-";
    type Request = ChatRequest;
    type Choice = ChatChoice;
    type Chunk = ChatChunkChoice;

    fn read(body: &[u8], limits: &Limits) -> Result<ChatRequest, Error> {
        ChatRequest::parse(body, limits)
    }

    fn parameters(request: &ChatRequest) -> &Parameters {
        &request.parameters
    }

    fn plan(request: &ChatRequest, model: &Model, bounds: &Bounds) -> Result<Plan, Error> {
        Plan::chat(request, model, bounds)
    }

    fn new(request: &ChatRequest) -> Self {
        Chat { top: request.parameters.sampling.logprobs, tokens_as_ids: request.parameters.tokens_as_ids }
    }

    fn opening(&self, index: u32) -> Option<ChatChunkChoice> {
        let delta = Delta { role: Some(ROLE), content: Some(String::new()) };
        Some(ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, stop_reason: None })
    }

    fn chunk(&self, model: &Model, index: u32, step: Step) -> ChatChunkChoice {
        let logprobs = self.logprobs(model, &step);
        let delta = Delta { role: None, content: Some(step.text) };
        ChatChunkChoice { index, delta, logprobs, finish_reason: None, stop_reason: None }
    }

    fn ending(&self, index: u32, finish: Finish) -> ChatChunkChoice {
        ChatChunkChoice {
            index,
            delta: Delta::default(),
            logprobs: None,
            finish_reason: Some(finish.reason),
            stop_reason: Some(finish.stop),
        }
    }

    fn choice(&self, model: &Model, index: u32, step: Step, finish: Finish) -> ChatChoice {
        let logprobs = self.logprobs(model, &step);
        let message = ReplyMessage { role: ROLE, content: step.text, refusal: None };
        ChatChoice { index, message, logprobs, finish_reason: finish.reason, stop_reason: finish.stop }
    }
}

impl Chat {
    fn logprobs(&self, model: &Model, step: &Step) -> Option<ChatLogprobs> {
        self.top.map(|top| logprobs::chat(&model.vocabulary, &step.tokens, top as usize, self.tokens_as_ids))
    }
}
