//! The whole engine over a simulated device.

mod cancel;
mod handoff;
mod limits;
mod schedule;
mod whole;

use crate::{
    EngineConfig, EngineHandle, Event, Executor, ExecutorError, Finish, Limits, Role, Running, SequenceSpec,
    StepOutput, drive,
    simulated::{Logits, SimExecutor, SimOptions, StepCost, next_token},
};
use kernels::{SampledToken, Sampling, StepInput};
use kv::{KvMemory, StepId};
use std::{
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;

const VOCAB: u32 = 97;
const LOGITS: Logits = Logits { vocab_size: VOCAB, tokenizer_size: VOCAB, end: None };

/// A device whose steps take no time.
fn small() -> SimOptions {
    SimOptions {
        limits: Limits { max_sequences: 8, max_step_tokens: 16, max_context: 4096, vocab_size: VOCAB },
        block_tokens: 4,
        blocks: 64,
        cost: StepCost::fixed(Duration::ZERO),
        logits: LOGITS,
        fail_step: None,
    }
}

/// Every step takes `millis`.
fn taking(millis: u64) -> SimOptions {
    SimOptions { cost: StepCost::fixed(Duration::from_millis(millis)), ..small() }
}

/// An engine as a task of the test's runtime.
fn start(options: SimOptions, config: EngineConfig) -> EngineHandle {
    start_watched(options, config).0
}

/// With the most steps that were ever in flight.
fn start_watched(options: SimOptions, config: EngineConfig) -> (EngineHandle, Arc<AtomicUsize>) {
    let (executor, _) = Watched::new(options);
    let most = executor.most.clone();
    let (handle, engine) = drive(executor, config);
    tokio::spawn(engine);
    (handle, most)
}

struct Watched {
    executor: SimExecutor,
    in_flight: usize,
    most: Arc<AtomicUsize>,
    lost: watch::Receiver<bool>,
}

impl Watched {
    /// And what makes it be lost, whatever runs.
    fn new(options: SimOptions) -> (Watched, watch::Sender<bool>) {
        let (lose, lost) = watch::channel(false);
        let executor = SimExecutor::new(options);
        (Watched { executor, in_flight: 0, most: Arc::default(), lost }, lose)
    }
}

impl Executor for Watched {
    fn submit(&mut self, step: StepInput) -> Result<StepId, ExecutorError> {
        self.in_flight += 1;
        assert!(self.in_flight <= Self::IN_FLIGHT, "too many steps in flight");
        self.most.fetch_max(self.in_flight, Ordering::Relaxed);
        self.executor.submit(step)
    }

    async fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        let output = tokio::select! {
            output = self.executor.collect() => output,
            Ok(_) = self.lost.wait_for(|lost| *lost) => {
                return Err(ExecutorError("no copy can be enqueued".to_owned()));
            }
        };
        self.in_flight -= 1;
        output
    }

    fn kv_memory(&self) -> Arc<dyn KvMemory> {
        self.executor.kv_memory()
    }

    fn limits(&self) -> Limits {
        self.executor.limits()
    }
}

fn role(role: Role) -> EngineConfig {
    EngineConfig { role, max_sequences: 8, max_step_tokens: 16, ..EngineConfig::default() }
}

/// `len` tokens of a family: equal families share their beginnings.
fn prompt(family: u64, len: usize) -> Vec<u32> {
    let hasher = BuildHasherDefault::<DefaultHasher>::new();
    (0..len).map(|at| (hasher.hash_one((family, at)) % u64::from(VOCAB)) as u32).collect()
}

fn spec(tokens: Vec<u32>, max_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        request_id: "test".to_owned(),
        prompt_len: tokens.len(),
        tokens,
        sampling: Sampling { seed: 7, logprobs: Some(0), ..Sampling::default() },
        max_tokens,
        stop_ids: vec![3],
        priority: 0,
        forced: None,
    }
}

/// What a sequence must answer, by definition.
fn answer(spec: &SequenceSpec) -> (Vec<SampledToken>, Finish) {
    let mut tokens = spec.tokens.clone();
    let mut output = Vec::new();
    loop {
        let token = next_token(&tokens, spec.prompt_len, &spec.sampling, &LOGITS);
        let id = token.id;
        output.push(token);
        tokens.push(id);
        if spec.stop_ids.contains(&id) {
            return (output, Finish::Stop(id));
        }
        if tokens.len() - spec.prompt_len >= spec.max_tokens {
            return (output, Finish::Length);
        }
    }
}

/// How a sequence ended.
#[derive(Debug, PartialEq)]
enum End {
    Finished(Finish),
    Preempted,
    Failed(String),
}

#[derive(Debug, Default)]
struct Heard {
    cached_tokens: Option<usize>,
    tokens: Vec<SampledToken>,
    prompt_logprobs: Vec<u32>,
    end: Option<End>,
}

/// Listens to the end; tokens must come in order, from position `first` on.
async fn listen(running: &mut Running, first: usize) -> Heard {
    let (mut heard, mut began) = (Heard::default(), None);
    while let Some(event) = running.events.recv().await {
        assert!(heard.end.is_none(), "nothing comes after the end");
        match event {
            Event::Started { cached_tokens } => assert!(heard.cached_tokens.replace(cached_tokens).is_none()),
            Event::Token { position, token, computed } => {
                assert_eq!(position as usize, first + heard.tokens.len());
                // A forced token was computed elsewhere.
                assert!(computed.is_none_or(|times| began.replace(times.ended) <= Some(times.began)));
                heard.tokens.push(token);
            }
            Event::PromptLogprob { position, .. } => heard.prompt_logprobs.push(position),
            Event::Computed { .. } => {}
            Event::Finished(finish) => heard.end = Some(End::Finished(finish)),
            Event::Preempted => heard.end = Some(End::Preempted),
            Event::Failed(cause) => heard.end = Some(End::Failed(cause)),
        }
    }
    heard
}

/// Generates and compares with the definition.
async fn generate_exactly(engine: &EngineHandle, spec: SequenceSpec) -> Heard {
    let (tokens, finish) = answer(&spec);
    let first = spec.tokens.len();
    let heard = listen(&mut engine.generate(spec).await.expect("taken"), first).await;
    assert_eq!(heard.tokens, tokens);
    assert_eq!(heard.end, Some(End::Finished(finish)));
    heard
}

/// Nothing may be held once nothing runs.
async fn assert_idle(engine: &EngineHandle) {
    let counts = engine.check_pool().await.expect("the pool is consistent");
    assert_eq!((counts.held, counts.quarantined), (0, 0), "{counts:?}");
    assert_eq!(counts.free + counts.cached, counts.total);
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}
