//! Random schedules: whatever arrives, leaves and is preempted, every sequence says what it says alone.

use super::*;
use proptest::{collection::vec, prelude::*};

#[derive(Clone, Debug)]
struct Ask {
    family: u64,
    len: usize,
    max_tokens: usize,
    priority: i32,
    seed: u64,
    arrives: u64,
    /// Milliseconds after which the client leaves.
    leaves: Option<u64>,
    prompt_logprobs: bool,
}

fn ask() -> impl Strategy<Value = Ask> {
    let leaves = prop_oneof![3 => Just(None), 1 => (0u64..60).prop_map(Some)];
    (0u64..4, 1usize..40, 1usize..40, -1i32..2, 0u64..3, 0u64..40, leaves, prop::bool::weighted(0.2))
        .prop_map(|(family, len, max_tokens, priority, seed, arrives, leaves, prompt_logprobs)| Ask {
            family,
            len,
            max_tokens,
            priority,
            seed,
            arrives,
            leaves,
            prompt_logprobs,
        })
}

impl Ask {
    fn spec(&self) -> SequenceSpec {
        let mut spec = spec(prompt(self.family, self.len), self.max_tokens);
        spec.priority = self.priority;
        spec.sampling.seed = self.seed;
        spec.sampling.prompt_logprobs = self.prompt_logprobs.then_some(0);
        spec
    }

    async fn run_whole(self, engine: EngineHandle) {
        pass(Duration::from_millis(self.arrives)).await;
        let Some(leaves) = self.leaves else {
            let heard = generate_exactly(&engine, self.spec()).await;
            let positions = if self.prompt_logprobs { 1..self.len as u32 } else { 0..0 };
            return assert_eq!(heard.prompt_logprobs, positions.collect::<Vec<_>>());
        };
        let running = engine.generate(self.spec()).await.expect("taken");
        pass(Duration::from_millis(leaves)).await;
        drop(running);
    }

    async fn run_split(self, prefill: EngineHandle, decode: EngineHandle) {
        pass(Duration::from_millis(self.arrives)).await;
        let mut spec = self.spec();
        spec.sampling.prompt_logprobs = None;
        let whole = super::handoff::split_exactly(&prefill, &decode, spec);
        match self.leaves {
            None => drop(whole.await),
            Some(leaves) => drop(tokio::time::timeout(Duration::from_millis(leaves), whole).await),
        }
    }
}

#[derive(Clone, Debug)]
struct Machine {
    blocks: u32,
    max_sequences: u32,
    max_step_tokens: u32,
    prefix_cache: bool,
}

fn machine() -> impl Strategy<Value = Machine> {
    // The longest sequence has 79 tokens: 20 blocks.
    (20u32..40, 1u32..8, 8u32..24, any::<bool>()).prop_map(
        |(blocks, max_sequences, max_step_tokens, prefix_cache)| Machine {
            blocks,
            max_sequences,
            max_step_tokens,
            prefix_cache,
        },
    )
}

impl Machine {
    fn start(&self, role: Role) -> EngineHandle {
        let mut options = SimOptions { blocks: self.blocks, ..taking(1) };
        options.limits.max_step_tokens = 24;
        let config = EngineConfig {
            role,
            max_sequences: self.max_sequences,
            max_step_tokens: self.max_step_tokens,
            prefix_cache: self.prefix_cache,
            ..EngineConfig::default()
        };
        start(options, config)
    }
}

/// In paused time: a deadlock shows as the deadline, at once.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("every sequence ends");
    });
}

async fn all(tasks: Vec<tokio::task::JoinHandle<()>>) {
    for task in tasks {
        task.await.expect("as if alone");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whole_sequences_never_notice_each_other(machine in machine(), asks in vec(ask(), 1..24)) {
        run(async {
            let engine = machine.start(Role::Both);
            all(asks.into_iter().map(|ask| tokio::spawn(ask.run_whole(engine.clone()))).collect()).await;
            assert_idle(&engine).await;
        });
    }

    #[test]
    fn split_sequences_never_notice_each_other(
        prefill in machine(),
        decode in machine(),
        asks in vec(ask(), 1..16),
    ) {
        run(async {
            let (prefill, decode) = (prefill.start(Role::Prefill), decode.start(Role::Decode));
            let tasks = asks.into_iter().map(|ask| tokio::spawn(ask.run_split(prefill.clone(), decode.clone())));
            all(tasks.collect()).await;
            assert_idle(&prefill).await;
            assert_idle(&decode).await;
        });
    }
}
