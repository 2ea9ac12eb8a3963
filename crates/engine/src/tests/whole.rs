//! Whole sequences: the right tokens, the prefix cache, the ends.

use super::*;
use crate::{StepKind, StepRecord};
use std::sync::Mutex;

#[tokio::test]
async fn every_length_gives_its_own_answer() {
    let engine = start(small(), role(Role::Both));
    for len in 1..40 {
        generate_exactly(&engine, spec(prompt(len as u64, len), 20)).await;
    }
    assert_idle(&engine).await;
}

#[tokio::test]
async fn many_at_once_answer_as_if_alone_and_two_steps_are_in_flight() {
    let (engine, most) = start_watched(small(), role(Role::Both));
    let tasks: Vec<_> = (0..40)
        .map(|n| {
            let engine = engine.clone();
            tokio::spawn(async move { generate_exactly(&engine, spec(prompt(n, 1 + n as usize), 25)).await })
        })
        .collect();
    for task in tasks {
        task.await.expect("exact");
    }
    assert_idle(&engine).await;
    assert_eq!(most.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_prefix_is_computed_once_but_never_a_whole_prompt_is_skipped() {
    let engine = start(small(), role(Role::Both));
    assert_eq!(generate_exactly(&engine, spec(prompt(1, 16), 1)).await.cached_tokens, Some(0));
    assert_eq!(generate_exactly(&engine, spec(prompt(1, 16), 1)).await.cached_tokens, Some(12));
    assert_eq!(generate_exactly(&engine, spec(prompt(1, 17), 1)).await.cached_tokens, Some(16));
    assert_eq!(generate_exactly(&engine, spec(prompt(1, 7), 1)).await.cached_tokens, Some(4));
    let off = start(small(), EngineConfig { prefix_cache: false, ..role(Role::Both) });
    generate_exactly(&off, spec(prompt(1, 16), 1)).await;
    assert_eq!(generate_exactly(&off, spec(prompt(1, 16), 1)).await.cached_tokens, Some(0));
    assert_eq!(off.check_pool().await.expect("consistent").cached, 0);
}

#[tokio::test]
async fn the_answer_is_part_of_the_next_prefix() {
    let engine = start(small(), role(Role::Both));
    let mut turn = spec(prompt(1, 10), 11);
    turn.stop_ids.clear();
    let heard = generate_exactly(&engine, turn.clone()).await;
    turn.tokens.extend(heard.tokens.iter().map(|token| token.id));
    turn.prompt_len = turn.tokens.len();
    // 21 tokens, of which the last was never computed: 5 full blocks.
    assert_eq!(generate_exactly(&engine, turn).await.cached_tokens, Some(20));
}

#[tokio::test]
async fn prompt_logprobs_are_told_once_and_need_every_position() {
    let engine = start(small(), role(Role::Both));
    let mut wanted = spec(prompt(1, 37), 3);
    generate_exactly(&engine, wanted.clone()).await;
    wanted.sampling.prompt_logprobs = Some(0);
    let mut running = engine.generate(wanted.clone()).await.expect("taken");
    let mut told = Vec::new();
    while let Some(event) = running.events.recv().await {
        match event {
            Event::Started { cached_tokens } => assert_eq!(cached_tokens, 0),
            Event::PromptLogprob { position, logprobs } => {
                assert_eq!(
                    logprobs,
                    crate::simulated::prompt_logprobs(&wanted.tokens, position as usize, 0, &LOGITS)
                );
                told.push(position);
            }
            _ => {}
        }
    }
    assert_eq!(told, (1..37).collect::<Vec<_>>());
    // A continuation has told them before.
    wanted.prompt_len = 30;
    wanted.max_tokens = 20;
    assert_eq!(generate_exactly(&engine, wanted).await.prompt_logprobs, Vec::<u32>::new());
}

#[tokio::test]
async fn a_continuation_goes_on_where_the_answer_broke_off() {
    let engine = start(small(), role(Role::Both));
    let mut whole = spec(prompt(5, 13), 30);
    whole.stop_ids.clear();
    let (tokens, _) = answer(&whole);
    let mut continued = whole.clone();
    continued.tokens.extend(tokens[..9].iter().map(|token| token.id));
    let heard = listen(&mut engine.generate(continued.clone()).await.expect("taken"), 22).await;
    assert_eq!(heard.tokens, tokens[9..]);
    // Here the first token to come is known already.
    continued.forced = Some(tokens[9].id);
    let heard = listen(&mut engine.generate(continued).await.expect("taken"), 22).await;
    assert_eq!(heard.tokens[0].id, tokens[9].id);
    assert_eq!(heard.tokens[1..], tokens[10..]);
    assert_eq!(heard.end, Some(End::Finished(Finish::Length)));
}

#[tokio::test]
async fn nothing_left_to_say_is_an_end_at_once() {
    let engine = start(small(), role(Role::Both));
    let mut spent = spec(prompt(1, 9), 4);
    spent.prompt_len = 5;
    let heard = listen(&mut engine.generate(spent.clone()).await.expect("taken"), 9).await;
    assert_eq!((heard.tokens.len(), heard.end), (0, Some(End::Finished(Finish::Length))));
    spent.max_tokens = 9;
    spent.forced = Some(3);
    let heard = listen(&mut engine.generate(spent).await.expect("taken"), 9).await;
    assert_eq!((heard.tokens.len(), heard.end), (1, Some(End::Finished(Finish::Stop(3)))));
    assert_idle(&engine).await;
}

#[tokio::test]
async fn the_context_ends_what_max_tokens_does_not() {
    let mut options = small();
    options.limits.max_context = 30;
    let engine = start(options, role(Role::Both));
    let mut long = spec(prompt(1, 20), 1000);
    long.stop_ids.clear();
    let heard = listen(&mut engine.generate(long).await.expect("taken"), 20).await;
    assert_eq!((heard.tokens.len(), heard.end), (10, Some(End::Finished(Finish::Length))));
    assert_idle(&engine).await;
}

#[tokio::test(start_paused = true)]
async fn out_of_blocks_the_younger_computes_again_and_both_are_exact() {
    let computed: Arc<Mutex<usize>> = Arc::default();
    let seen = Arc::clone(&computed);
    let on_step = move |record: StepRecord| *seen.lock().expect("not poisoned") += record.tokens;
    let options = SimOptions { blocks: 12, ..taking(1) };
    let engine = start(options, EngineConfig { on_step: Some(Arc::new(on_step)), ..role(Role::Both) });
    let run = |family, priority| {
        let mut spec = SequenceSpec { priority, ..spec(prompt(family, 12), 30) };
        spec.stop_ids.clear();
        let engine = engine.clone();
        tokio::spawn(async move {
            generate_exactly(&engine, spec).await;
            tokio::time::Instant::now()
        })
    };
    let (younger, elder) = (run(1, 1), run(2, 0));
    assert!(elder.await.expect("exact") < younger.await.expect("exact"));
    // Undisturbed: 12 of the prompt and 29 of the output each.
    assert!(*computed.lock().expect("not poisoned") > 2 * 41, "nobody was preempted");
    assert_idle(&engine).await;
}

#[tokio::test]
async fn the_more_urgent_goes_first() {
    let options = taking(1);
    let engine = start(options, EngineConfig { max_sequences: 1, ..role(Role::Both) });
    let order = Arc::new(Mutex::new(Vec::new()));
    let tasks: Vec<_> = [0, 5, -5, 0]
        .into_iter()
        .enumerate()
        .map(|(n, priority)| {
            let (engine, order) = (engine.clone(), Arc::clone(&order));
            tokio::spawn(async move {
                let spec = SequenceSpec { priority, ..spec(prompt(n as u64, 30), 5) };
                let mut running = engine.generate(spec).await.expect("taken");
                listen(&mut running, 30).await;
                order.lock().expect("not poisoned").push(n);
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("finished");
    }
    assert_eq!(*order.lock().expect("not poisoned"), [2, 0, 3, 1]);
}

#[tokio::test]
async fn steps_are_recorded_and_prompts_are_chunked_to_the_budget() {
    let steps: Arc<Mutex<Vec<StepRecord>>> = Arc::default();
    let seen = Arc::clone(&steps);
    let on_step = move |record: StepRecord| seen.lock().expect("not poisoned").push(record);
    let config = EngineConfig { on_step: Some(Arc::new(on_step)), ..role(Role::Both) };
    let engine = start(small(), config);
    let mut one = spec(prompt(1, 40), 3);
    one.stop_ids.clear();
    generate_exactly(&engine, one).await;
    let steps = steps.lock().expect("not poisoned");
    let seen: Vec<_> = steps.iter().map(|step| (step.kind, step.tokens, step.sequences)).collect();
    let (prefill, decode) = (StepKind::Prefill, StepKind::Decode);
    assert_eq!(seen, [(prefill, 16, 1), (prefill, 16, 1), (prefill, 8, 1), (decode, 1, 1), (decode, 1, 1)]);
}
