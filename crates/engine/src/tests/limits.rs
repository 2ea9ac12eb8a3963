//! What is refused, and what the engine says when it dies.

use super::*;
use crate::{Refused, spawn};
use std::sync::Mutex;

/// The cause of a refusal.
async fn refused(engine: &EngineHandle, spec: SequenceSpec) -> Refused {
    engine.generate(spec).await.err().expect("must be refused")
}

#[tokio::test]
async fn what_can_never_fit_is_refused_at_once() {
    let engine = start(SimOptions { blocks: 5, ..small() }, role(Role::Both));
    assert_eq!(engine.limits().max_context, 20, "the pool's, which is less than the model's");
    let what = "what the block pool holds";
    assert_eq!(
        refused(&engine, spec(prompt(1, 20), 1)).await,
        Refused::TooLong { tokens: 21, limit: 20, what }
    );
    generate_exactly(&engine, spec(prompt(1, 19), 1)).await;
    let mut options = small();
    options.limits.max_context = 20;
    let engine = start(options, role(Role::Both));
    let what = "the model's context";
    assert_eq!(
        refused(&engine, spec(prompt(1, 20), 1)).await,
        Refused::TooLong { tokens: 21, limit: 20, what }
    );
}

#[tokio::test]
async fn what_the_model_cannot_index_is_refused() {
    let engine = start(small(), role(Role::Both));
    let good = spec(prompt(1, 5), 5);
    let mut bias = good.clone();
    bias.sampling.logit_bias = vec![(VOCAB, 1.0)];
    for bad in [
        SequenceSpec { tokens: vec![VOCAB], prompt_len: 1, ..good.clone() },
        SequenceSpec { prompt_len: 0, ..good.clone() },
        SequenceSpec { prompt_len: 6, ..good.clone() },
        SequenceSpec { max_tokens: 0, ..good.clone() },
        SequenceSpec { forced: Some(VOCAB), ..good.clone() },
        bias,
    ] {
        assert!(matches!(refused(&engine, bad).await, Refused::Invalid(_)));
    }
    let decode = start(small(), role(Role::Decode));
    assert!(matches!(refused(&decode, good.clone()).await, Refused::Invalid(_)));
    assert!(matches!(decode.prefill(good.clone()).await.err(), Some(Refused::Invalid(_))));
    let prefill = start(small(), role(Role::Prefill));
    assert!(matches!(prefill.reserve(good).await.err(), Some(Refused::Invalid(_))));
}

#[tokio::test]
async fn a_full_queue_refuses() {
    let options = taking(1);
    let engine = start(options, EngineConfig { max_sequences: 1, waiting_limit: 2, ..role(Role::Both) });
    let mut running = engine.generate(spec(prompt(1, 5), 50)).await.expect("taken");
    running.events.recv().await.expect("started");
    let waiting =
        (engine.generate(spec(prompt(2, 5), 5)).await, engine.generate(spec(prompt(3, 5), 5)).await);
    assert!(matches!(refused(&engine, spec(prompt(4, 5), 5)).await, Refused::Full(_)));
    assert_eq!(engine.load().borrow().waiting, 2);
    drop(waiting);
    generate_exactly(&engine, spec(prompt(4, 5), 5)).await;
}

#[tokio::test]
async fn reservations_leave_room_for_decoding() {
    let config = EngineConfig { max_reserved_share: 0.5, max_sequences: 3, ..role(Role::Decode) };
    let engine = start(SimOptions { blocks: 20, ..small() }, config);
    let wide = engine.reserve(spec(prompt(1, 59), 50)).await.expect("a lone one may exceed the share");
    assert_eq!((wide.blocks.len(), wide.present), (15, 0));
    assert!(
        matches!(engine.reserve(spec(prompt(2, 4), 5)).await.err(), Some(Refused::Full(_))),
        "over the share"
    );
    drop(wide);
    let small = || async { engine.reserve(spec(prompt(3, 8), 5)).await };
    let held = [small().await.expect("1"), small().await.expect("2"), small().await.expect("3")];
    assert!(matches!(small().await.err(), Some(Refused::Full(_))), "no slot");
    assert_eq!(engine.load().borrow().reserved, 3);
    drop(held);
    assert_idle(&engine).await;
}

#[tokio::test]
async fn a_dead_executor_ends_everything_with_its_cause() {
    let engine = start(SimOptions { fail_step: Some(4), ..small() }, role(Role::Both));
    let mut running = engine.generate(spec(prompt(1, 30), 50)).await.expect("taken");
    let mut offered = engine.prefill(spec(prompt(2, 3), 5)).await.expect("taken");
    let cause = "step 4 was told to fail".to_owned();
    assert_eq!(listen(&mut running, 30).await.end, Some(End::Failed(cause.clone())));
    assert_eq!(listen(&mut offered, 3).await.end, Some(End::Failed(cause.clone())));
    assert_eq!(engine.stopped().await, cause);
    assert_eq!(refused(&engine, spec(prompt(1, 3), 5)).await, Refused::Stopped(cause.clone()));
    assert_eq!(engine.check_pool().await, Err(cause));
}

#[test]
fn a_panic_on_the_engines_thread_is_seen_as_its_end() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let on_step = |_| panic!("a broken invariant");
    let config = EngineConfig { on_step: Some(Arc::new(on_step)), ..role(Role::Both) };
    runtime.block_on(async {
        let engine = spawn(SimExecutor::new(small()), config);
        let mut running = engine.generate(spec(prompt(1, 3), 5)).await.expect("taken");
        listen(&mut running, 3).await;
        assert_eq!(engine.stopped().await, "its thread has ended");
    });
}

#[test]
fn an_engine_on_its_own_thread_ends_with_its_last_user() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let seen: Arc<Mutex<u32>> = Arc::default();
    let counted = Arc::clone(&seen);
    let config = EngineConfig {
        on_step: Some(Arc::new(move |_| *counted.lock().expect("sound") += 1)),
        ..role(Role::Both)
    };
    let engine = spawn(SimExecutor::new(small()), config);
    runtime.block_on(async {
        let mut running = engine.generate(spec(prompt(1, 30), 9)).await.expect("taken");
        drop(engine);
        assert!(listen(&mut running, 30).await.end.is_some(), "a sequence outlives the handles");
    });
    // The thread drops the observer when it ends.
    for _ in 0..1000 {
        if Arc::strong_count(&seen) == 1 {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the engine's thread goes on without users");
}

#[tokio::test]
async fn a_device_that_is_lost_while_nothing_runs_ends_the_engine() {
    let (executor, lose) = Watched::new(small());
    let (engine, driver) = drive(executor, role(Role::Decode));
    let driver = tokio::spawn(driver);
    let reservation = engine.reserve(spec(prompt(1, 5), 5)).await.expect("it lives");
    lose.send_replace(true);
    let cause = tokio::time::timeout(Duration::from_secs(10), engine.stopped()).await.expect("it is noticed");
    assert!(cause.contains("no copy can be enqueued"), "{cause}");
    drop(reservation);
    driver.await.unwrap();
}
