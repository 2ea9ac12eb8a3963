//! Letting go in every state: nothing stays held, the others do not notice.

use super::*;
use crate::FirstToken;

fn slow() -> SimOptions {
    taking(10)
}

/// Drops a whole sequence after `wait`, beside one that must not notice.
async fn drop_after(wait: Duration) {
    let engine = start(slow(), EngineConfig { max_sequences: 2, ..role(Role::Both) });
    let witness = tokio::spawn({
        let engine = engine.clone();
        async move { generate_exactly(&engine, spec(prompt(1, 30), 30)).await }
    });
    let mut long = spec(prompt(2, 50), 50);
    long.stop_ids.clear();
    let running = engine.generate(long).await.expect("taken");
    pass(wait).await;
    drop(running);
    witness.await.expect("undisturbed");
    assert_idle(&engine).await;
}

#[tokio::test(start_paused = true)]
async fn a_sequence_dropped_at_any_time_frees_everything() {
    for millis in (0..300).step_by(7) {
        drop_after(Duration::from_millis(millis)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiting_sequence_leaves_the_queue() {
    let engine = start(slow(), EngineConfig { max_sequences: 1, ..role(Role::Both) });
    let mut first = engine.generate(spec(prompt(1, 9), 9)).await.expect("taken");
    first.events.recv().await.expect("started");
    drop(engine.generate(spec(prompt(2, 9), 9)).await.expect("taken"));
    let mut third = engine.generate(spec(prompt(3, 9), 9)).await.expect("taken");
    assert_eq!(engine.load().borrow().waiting, 1);
    drop(first);
    assert!(listen(&mut third, 9).await.end.is_some());
    assert_idle(&engine).await;
}

#[tokio::test(start_paused = true)]
async fn a_hand_off_dropped_at_any_time_frees_everything() {
    let engine = start(slow(), role(Role::Prefill));
    for millis in (0..80).step_by(5) {
        let running = engine.prefill(spec(prompt(millis, 45), 5)).await.expect("taken");
        running.release(0);
        pass(Duration::from_millis(millis)).await;
        running.release(1);
        drop(running);
        assert_idle(&engine).await;
    }
}

#[tokio::test]
async fn a_reservation_dropped_in_any_state_frees_everything() {
    let engine = start(small(), role(Role::Decode));
    drop(engine.reserve(spec(prompt(1, 9), 9)).await.expect("taken"));
    assert_idle(&engine).await;
    let reservation = engine.reserve(spec(prompt(1, 9), 9)).await.expect("taken");
    drop(reservation.activate(FirstToken(5)));
    assert_idle(&engine).await;
    let reservation = engine.reserve(spec(prompt(1, 9), 9)).await.expect("taken");
    drop(reservation.activate(FirstToken(5)).await);
    assert_idle(&engine).await;
}

#[tokio::test]
async fn an_asker_that_is_gone_gets_nothing() {
    let engine = start(small(), role(Role::Both));
    let ask = engine.generate(spec(prompt(1, 9), 9));
    tokio::select! {
        biased;
        _ = ask => panic!("the engine has not run yet"),
        () = std::future::ready(()) => {}
    }
    assert_idle(&engine).await;
}
