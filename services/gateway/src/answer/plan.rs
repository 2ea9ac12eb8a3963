//! A request made concrete for the model: prompts rendered and encoded, defaults filled in, limits that need
//! the model checked. CPU work only; long ones belong away from the threads that stream.

use super::choice::Ends;
use crate::model::{Conversation, Model};
use openai::{ChatRequest, Code, CompletionRequest, Error, Parameters, Prompt};
use std::sync::Arc;

/// What the operator and the cluster allow.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Tokens of prompt and output together.
    pub max_context: u32,
    /// Tokens of one prompt; 0: no limit of its own.
    pub prompt_tokens: u32,
    /// Prompts times choices.
    pub sequences: usize,
    /// The lowest and the highest number that may be asked for.
    pub priorities: (i32, i32),
    /// For completions without `max_tokens`; 0: as far as the context reaches.
    pub default_completion_tokens: u32,
}

pub struct Plan {
    pub prompts: Vec<PlannedPrompt>,
    /// Choices per prompt.
    pub n: u32,
    pub ends: Arc<Ends>,
    /// Without the choice's index.
    sampling: proto::Sampling,
    /// Without `max_tokens`.
    stop: proto::Stop,
    priority: i32,
}

pub struct PlannedPrompt {
    pub tokens: Vec<u32>,
    /// The prompt's text, if it is to precede the completion.
    pub echo: Option<String>,
    max_tokens: u32,
}

impl Plan {
    pub fn chat(request: &ChatRequest, model: &Model, bounds: &Bounds) -> Result<Self, Error> {
        let Some(template) = &model.template else {
            return Err(Error::value(
                "messages",
                "this model has no chat template, so only /v1/completions is served; \
                 the operator can add chat_template.jinja to the model directory",
            ));
        };
        let conversation = Conversation {
            messages: &request.messages,
            add_generation_prompt: request.add_generation_prompt,
            continue_final_message: request.continue_final_message,
            kwargs: &request.template_kwargs,
        };
        let text = template.render(&conversation).map_err(|problem| Error::value("messages", problem))?;
        let prompt =
            Planner { model, bounds, parameters: &request.parameters, param: "messages", default_tokens: 0 };
        let tokens = prompt.encode(&text, request.add_special_tokens)?;
        let prompts = vec![prompt.planned(tokens, None)?];
        Plan::new(prompts, &request.parameters, model, bounds, false)
    }

    pub fn completions(request: &CompletionRequest, model: &Model, bounds: &Bounds) -> Result<Self, Error> {
        let default_tokens = bounds.default_completion_tokens;
        let planner =
            Planner { model, bounds, parameters: &request.parameters, param: "prompt", default_tokens };
        let prompts: Result<_, _> =
            request.prompts.iter().map(|prompt| planner.prompt(request, prompt)).collect();
        Plan::new(prompts?, &request.parameters, model, bounds, request.echo)
    }

    fn new(
        prompts: Vec<PlannedPrompt>,
        parameters: &Parameters,
        model: &Model,
        bounds: &Bounds,
        echo: bool,
    ) -> Result<Self, Error> {
        let sequences = prompts.len() * parameters.n as usize;
        if sequences > bounds.sequences {
            let problem = format!(
                "{} prompts times {} choices exceed {}",
                prompts.len(),
                parameters.n,
                bounds.sequences
            );
            return Err(Error::value("n", problem));
        }
        check_ids(parameters, model.vocab_size)?;
        Ok(Plan {
            prompts,
            n: parameters.n,
            ends: Arc::new(ends(parameters, model)),
            sampling: sampling(parameters, model, echo),
            stop: stop(parameters, model),
            priority: priority(parameters, bounds)?,
        })
    }

    /// What the router is to run for one choice.
    pub fn sequence(&self, prompt: usize, choice: u32, request_id: String) -> proto::Sequence {
        let PlannedPrompt { tokens, max_tokens, .. } = &self.prompts[prompt];
        let first = choice == 0;
        proto::Sequence {
            request_id,
            prompt_len: tokens.len() as u32,
            tokens: tokens.clone(),
            sampling: Some(proto::Sampling {
                choice,
                prompt_logprobs: self.sampling.prompt_logprobs.filter(|_| first),
                ..self.sampling.clone()
            }),
            stop: Some(proto::Stop { max_tokens: *max_tokens, ..self.stop.clone() }),
            priority: self.priority,
        }
    }

    /// All that it may take, for its key's account; `assumed`: output of a choice that has no bound of the client's.
    pub fn most_tokens(&self, assumed: Option<u32>) -> u64 {
        let output =
            |prompt: &PlannedPrompt| assumed.map_or(prompt.max_tokens, |most| most.min(prompt.max_tokens));
        let of = |prompt: &PlannedPrompt| {
            prompt.tokens.len() as u64 + u64::from(self.n) * u64::from(output(prompt))
        };
        self.prompts.iter().map(of).sum()
    }

    pub fn prompt_tokens(&self) -> u32 {
        self.prompts.iter().map(|prompt| prompt.tokens.len() as u32).sum()
    }

    /// Whether echoed prompts carry logprobs.
    pub fn scores_prompts(&self) -> bool {
        self.sampling.prompt_logprobs.is_some()
    }
}

struct Planner<'a> {
    model: &'a Model,
    bounds: &'a Bounds,
    parameters: &'a Parameters,
    /// The field that holds the prompt.
    param: &'static str,
    /// 0: as far as the context reaches.
    default_tokens: u32,
}

impl Planner<'_> {
    fn prompt(&self, request: &CompletionRequest, prompt: &Prompt) -> Result<PlannedPrompt, Error> {
        let vocabulary = &self.model.vocabulary;
        match prompt {
            Prompt::Text(text) => {
                let tokens = self.encode(text, request.add_special_tokens)?;
                self.planned(tokens, request.echo.then(|| text.clone()))
            }
            Prompt::Tokens(tokens) => {
                self.known(tokens)?;
                let echo = || vocabulary.decode(tokens, request.parameters.skip_special_tokens);
                self.planned(tokens.clone(), request.echo.then(echo))
            }
        }
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Error> {
        let vocabulary = &self.model.vocabulary;
        let least = text.len() / vocabulary.longest().max(1);
        if least > self.bounds.max_context as usize {
            return Err(self.too_long(format!("at least {least}")));
        }
        vocabulary.encode(text, special).map_err(|problem| Error::value(self.param, problem))
    }

    fn known(&self, tokens: &[u32]) -> Result<(), Error> {
        let size = self.model.vocab_size;
        match tokens.iter().find(|id| **id >= size) {
            Some(id) => Err(Error::value(self.param, format!("token ids are below {size}, found {id}"))),
            None => Ok(()),
        }
    }

    fn planned(&self, tokens: Vec<u32>, echo: Option<String>) -> Result<PlannedPrompt, Error> {
        let len = tokens.len() as u32;
        let limit = self.bounds.prompt_tokens;
        if tokens.is_empty() {
            return Err(Error::value(self.param, "encodes to no tokens, expected at least one"));
        }
        if len >= self.bounds.max_context || (limit > 0 && len > limit) {
            return Err(self.too_long(len.to_string()));
        }
        let room = self.bounds.max_context - len;
        let default = if self.default_tokens == 0 { room } else { self.default_tokens.min(room) };
        let max_tokens = self.parameters.ending.max_tokens.unwrap_or(default);
        if max_tokens > room {
            return Err(self.too_much(len, max_tokens));
        }
        let min_tokens = self.parameters.ending.min_tokens;
        if min_tokens > max_tokens {
            let problem =
                format!("found {min_tokens}, but there is room for at most {max_tokens} tokens of output");
            return Err(Error::value("min_tokens", problem));
        }
        Ok(PlannedPrompt { tokens, echo, max_tokens: max_tokens.max(1) })
    }

    fn too_long(&self, found: String) -> Error {
        let context = self.bounds.max_context;
        let limit = match self.bounds.prompt_tokens {
            0 => context - 1,
            limit => limit.min(context - 1),
        };
        let message = format!(
            "This model's maximum context length is {context} tokens, and a prompt may have at most {limit}. \
             However, {} has {found} tokens. Please shorten it.",
            self.param
        );
        Error::at(Code::ContextLength, self.param, message)
    }

    fn too_much(&self, prompt: u32, output: u32) -> Error {
        let context = self.bounds.max_context;
        let message = format!(
            "This model's maximum context length is {context} tokens. However, you requested {} tokens \
             ({prompt} in {}, {output} in the completion). Please reduce max_tokens or the prompt.",
            u64::from(prompt) + u64::from(output),
            self.param
        );
        Error::at(Code::ContextLength, "max_tokens", message)
    }
}

/// 0 unless asked otherwise, or what is nearest to it.
fn priority(parameters: &Parameters, bounds: &Bounds) -> Result<i32, Error> {
    let (least, most) = bounds.priorities;
    match parameters.priority {
        None => Ok(0.clamp(least, most)),
        Some(asked) if (least..=most).contains(&asked) => Ok(asked),
        Some(asked) => {
            let problem = format!("found {asked}, but may be {least} to {most} here (lower is served first)");
            Err(Error::value("priority", problem))
        }
    }
}

fn check_ids(parameters: &Parameters, size: u32) -> Result<(), Error> {
    let biased = parameters.sampling.logit_bias.iter().map(|(id, _)| ("logit_bias", *id));
    let stops = parameters.ending.stop_token_ids.iter().map(|id| ("stop_token_ids", *id));
    match biased.chain(stops).find(|(_, id)| *id >= size) {
        Some((field, id)) => Err(Error::value(field, format!("token ids are below {size}, found {id}"))),
        None => Ok(()),
    }
}

fn ends(parameters: &Parameters, model: &Model) -> Ends {
    let ending = &parameters.ending;
    Ends {
        stop: ending.stop.clone(),
        include_stop_str: ending.include_stop_str,
        stop_token_ids: ending.stop_token_ids.clone(),
        eos_ids: if ending.ignore_eos { Vec::new() } else { model.eos_ids.clone() },
        min_tokens: ending.min_tokens,
        skip_special: parameters.skip_special_tokens,
        logprobs: parameters.sampling.logprobs.is_some(),
        discard: ending.max_tokens == Some(0),
    }
}

/// The client's values, else the model's own defaults, else OpenAI's.
fn sampling(parameters: &Parameters, model: &Model, echo: bool) -> proto::Sampling {
    let (asked, own) = (&parameters.sampling, &model.defaults);
    proto::Sampling {
        temperature: asked.temperature.unwrap_or(own.temperature),
        top_k: asked.top_k.unwrap_or(own.top_k).min(i32::MAX as u32) as i32,
        top_p: asked.top_p.unwrap_or(own.top_p),
        min_p: asked.min_p.unwrap_or(own.min_p),
        presence_penalty: asked.presence_penalty.unwrap_or(0.0),
        frequency_penalty: asked.frequency_penalty.unwrap_or(0.0),
        repetition_penalty: asked.repetition_penalty.unwrap_or(own.repetition_penalty),
        logit_bias: asked.logit_bias.iter().copied().collect(),
        seed: asked.seed.unwrap_or_else(draw),
        choice: 0,
        logprobs: asked.logprobs,
        prompt_logprobs: asked.logprobs.filter(|_| echo),
    }
}

fn draw() -> u64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high.rotate_left(32) ^ low
}

fn stop(parameters: &Parameters, model: &Model) -> proto::Stop {
    let ending = &parameters.ending;
    proto::Stop {
        max_tokens: 0,
        min_tokens: ending.min_tokens,
        token_ids: ending.stop_token_ids.clone(),
        eos_ids: model.eos_ids.clone(),
        ignore_eos: ending.ignore_eos,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::choice::Choice;
    use serde_json::json;
    use std::path::Path;

    const LIMITS: openai::Limits = openai::Limits { choices: 8, prompts: 8, messages: 8, characters: 10_000 };

    fn demo() -> Model {
        Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/checkpoint"), 0).unwrap()
    }

    fn bounds() -> Bounds {
        Bounds {
            max_context: 2048,
            prompt_tokens: 0,
            sequences: 8,
            priorities: (-10, 10),
            default_completion_tokens: 0,
        }
    }

    fn completion(model: &Model, bounds: Bounds, extra: serde_json::Value) -> Result<proto::Sequence, Error> {
        let mut body = json!({"model": "m", "prompt": [5, 6, 7]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let request = CompletionRequest::parse(body.to_string().as_bytes(), &LIMITS)?;
        Ok(Plan::completions(&request, model, &bounds)?.sequence(0, 0, "id".into()))
    }

    /// Every golden question becomes its ids, and every golden answer its text.
    #[test]
    fn golden_questions_and_answers() {
        let model = Arc::new(demo());
        let lines = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/demo/golden.jsonl"));
        for line in lines.lines() {
            let golden: serde_json::Value = serde_json::from_str(line).unwrap();
            let ids = |name: &str| {
                golden[name]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|id| id.as_u64().unwrap() as u32)
                    .collect::<Vec<_>>()
            };
            let body = json!({"model": "m", "messages": [{"role": "user", "content": golden["question"]}]});
            let request = ChatRequest::parse(body.to_string().as_bytes(), &LIMITS).unwrap();
            let plan = Plan::chat(&request, &model, &bounds()).unwrap();
            assert_eq!(plan.prompts[0].tokens, ids("prompt_ids"), "{line}");
            let mut choice = Choice::new(model.clone(), plan.ends.clone(), &plan.prompts[0].tokens, 0);
            let token = |id: &u32| proto::Token { id: *id, ..proto::Token::default() };
            let mut text: String = ids("answer_ids").iter().map(|id| choice.token(&token(id)).text).collect();
            text += &choice.finish(proto::FinishReason::Stop, Some(1)).text;
            assert_eq!(text, golden["answer"].as_str().unwrap());
        }
    }

    #[test]
    fn what_the_client_leaves_open_the_model_decides() {
        let mut model = demo();
        model.defaults.temperature = 0.6;
        model.defaults.top_p = 0.95;
        let open = completion(&model, bounds(), json!({})).unwrap().sampling.unwrap();
        assert_eq!((open.temperature, open.top_p), (0.6, 0.95));
        let said = completion(&model, bounds(), json!({"temperature": 1, "top_p": 1, "seed": 3}))
            .unwrap()
            .sampling
            .unwrap();
        assert_eq!((said.temperature, said.top_p, said.seed), (1.0, 1.0, 3));
        let other = completion(&model, bounds(), json!({})).unwrap().sampling.unwrap();
        assert_ne!(open.seed, other.seed, "drawn for each request");
    }

    #[test]
    fn max_tokens_fill_the_context_unless_said_otherwise() {
        let model = demo();
        let limit = |bounds, extra| {
            completion(&model, bounds, extra).map(|sequence| sequence.stop.unwrap().max_tokens)
        };
        assert_eq!(limit(bounds(), json!({})), Ok(2045));
        assert_eq!(limit(Bounds { default_completion_tokens: 16, ..bounds() }, json!({})), Ok(16));
        assert_eq!(
            limit(Bounds { max_context: 10, default_completion_tokens: 16, ..bounds() }, json!({})),
            Ok(7)
        );
        assert_eq!(limit(bounds(), json!({"max_tokens": 2045})), Ok(2045));
        let error = limit(bounds(), json!({"min_tokens": 2046})).unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (Code::InvalidValue, Some("min_tokens")));
        let error = limit(bounds(), json!({"max_tokens": u32::MAX})).unwrap_err();
        assert!(error.message.contains("4294967298 tokens (3 in prompt"), "{}", error.message);
        assert!(
            limit(Bounds { prompt_tokens: 2, ..bounds() }, json!({}))
                .is_err_and(|e| e.code == Code::ContextLength)
        );
    }
}
