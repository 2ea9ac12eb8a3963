//! Prefill in one engine, decode in another, KV bytes carried between them.

use super::*;
use crate::{ComputedBlock, FirstToken, Refused, Reservation};
use kv::{KvMemory, StepId};

/// Carries one block as soon as it is announced; the read is enqueued at once, the rest may take its time.
async fn carry(
    from: Arc<dyn KvMemory>,
    to: &EngineHandle,
    reservation: &Reservation,
    computed: ComputedBlock,
    after: StepId,
) {
    let read = from.read(computed.block, computed.rows, after);
    let payload = read.await.expect("the device lives").expect("read");
    let target = reservation.blocks[computed.index as usize];
    let written = to.kv_memory().write(target, computed.rows, payload, to.last_submitted());
    written.await.expect("the device lives").expect("written");
}

/// Prefills into a reservation; what was heard up to the first token.
pub(super) async fn deliver(
    prefill: &EngineHandle,
    decode: &EngineHandle,
    spec: &SequenceSpec,
    reservation: &Reservation,
) -> Heard {
    let mut heard = Heard::default();
    let mut running = prefill.prefill(spec.clone()).await.expect("taken");
    let mut delivered = 0;
    while let Some(event) = running.events.recv().await {
        match event {
            Event::Computed { blocks, after } => {
                for computed in blocks {
                    assert_eq!(computed.index, delivered, "every block once, in order");
                    delivered += 1;
                    if computed.index >= reservation.present {
                        carry(prefill.kv_memory(), decode, reservation, computed, after).await;
                    }
                    running.release(computed.index);
                }
            }
            Event::Started { cached_tokens } => heard.cached_tokens = Some(cached_tokens),
            Event::Token { token, .. } => {
                heard.tokens.push(token);
                break;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!(
        delivered as usize,
        spec.tokens.len().div_ceil(4),
        "all blocks were announced before the token"
    );
    heard
}

/// One answer by two engines, placed again when preempted; the whole of it must be exact.
pub(super) async fn split_exactly(
    prefill: &EngineHandle,
    decode: &EngineHandle,
    spec: SequenceSpec,
) -> usize {
    let (expected, finish) = answer(&spec);
    let mut continued = spec.clone();
    let mut output: Vec<SampledToken> = Vec::new();
    let mut placements = 0;
    loop {
        placements += 1;
        let reservation = reserve(decode, &continued).await;
        let first = deliver(prefill, decode, &continued, &reservation).await.tokens.remove(0);
        let mut running = reservation.activate(FirstToken(first.id)).await;
        output.push(first);
        let heard = listen(&mut running, spec.tokens.len() + output.len()).await;
        output.extend(heard.tokens);
        match heard.end.expect("it ends somehow") {
            End::Finished(end) => {
                assert_eq!((output, end), (expected, finish));
                return placements;
            }
            End::Preempted => {
                continued.tokens.clone_from(&spec.tokens);
                continued.tokens.extend(output.iter().map(|token| token.id));
            }
            End::Failed(cause) => panic!("{cause}"),
        }
    }
}

/// As a router does: tries again while there is no room.
async fn reserve(decode: &EngineHandle, spec: &SequenceSpec) -> Reservation {
    loop {
        match decode.reserve(spec.clone()).await {
            Ok(reservation) => return reservation,
            Err(Refused::Full(_)) => pass(Duration::from_millis(3)).await,
            Err(other) => panic!("{other}"),
        }
    }
}

fn pair(blocks: u32) -> (EngineHandle, EngineHandle) {
    let options = taking(1);
    let prefill = start(options.clone(), role(Role::Prefill));
    (prefill, start(SimOptions { blocks, ..options }, role(Role::Decode)))
}

#[tokio::test(start_paused = true)]
async fn split_is_whole_at_every_length() {
    let (prefill, decode) = pair(64);
    for len in 1..40 {
        assert_eq!(split_exactly(&prefill, &decode, spec(prompt(len as u64, len), 20)).await, 1);
    }
    assert_idle(&prefill).await;
    assert_idle(&decode).await;
}

#[tokio::test(start_paused = true)]
async fn many_splits_with_shared_prefixes_and_preemption_are_exact() {
    let (prefill, decode) = pair(24);
    let tasks: Vec<_> = (0..30)
        .map(|n: u64| {
            let (prefill, decode) = (prefill.clone(), decode.clone());
            let mut spec = spec(prompt(n % 3, 5 + n as usize), 30);
            spec.sampling.seed = n;
            tokio::spawn(async move { split_exactly(&prefill, &decode, spec).await })
        })
        .collect();
    let mut placements = 0;
    for task in tasks {
        placements += task.await.expect("exact");
    }
    assert!(placements > 30, "the pool is small enough that somebody was preempted");
    assert_idle(&prefill).await;
    assert_idle(&decode).await;
}

#[tokio::test(start_paused = true)]
async fn what_decode_has_already_need_not_travel() {
    let (prefill, decode) = pair(64);
    split_exactly(&prefill, &decode, spec(prompt(1, 16), 3)).await;
    let again = decode.reserve(spec(prompt(1, 16), 3)).await.expect("room");
    assert_eq!((again.blocks.len(), again.present), (5, 4), "full blocks, the last one included");
    assert_eq!(deliver(&prefill, &decode, &spec(prompt(1, 16), 3), &again).await.cached_tokens, Some(12));
}

#[tokio::test(start_paused = true)]
async fn offers_hold_blocks_until_released_and_others_wait_for_them() {
    let options = SimOptions { blocks: 10, ..small() };
    let engine = start(options, role(Role::Prefill));
    let mut first = engine.prefill(spec(prompt(1, 38), 5)).await.expect("taken");
    while !matches!(first.events.recv().await.expect("goes on"), Event::Token { .. }) {}
    assert_eq!(engine.check_pool().await.expect("consistent").held, 10);
    let mut second = engine.prefill(spec(prompt(2, 8), 5)).await.expect("taken");
    pass(Duration::from_millis(50)).await;
    assert_eq!((engine.load().borrow().waiting, engine.load().borrow().running), (1, 0));
    first.release(9);
    first.offers().release(3);
    first.release(3);
    first.release(77);
    while !matches!(second.events.recv().await.expect("goes on"), Event::Token { .. }) {}
    assert_eq!(engine.check_pool().await.expect("consistent").held, 10);
    drop((first, second));
    assert_idle(&engine).await;
}

#[tokio::test]
async fn blocks_that_are_being_written_into_are_nobodys_when_their_reservation_ends() {
    let engine = start(
        SimOptions { blocks: 10, ..taking(1) },
        EngineConfig { prefix_cache: false, ..role(Role::Decode) },
    );
    let reservation = engine.reserve(spec(prompt(1, 38), 2)).await.expect("room");
    assert_eq!(reservation.blocks.len(), 10);
    let quarantine = reservation.quarantine(vec![3, 7]).await;
    let counts = engine.check_pool().await.expect("consistent");
    assert_eq!((counts.held, counts.quarantined, counts.free), (0, 2, 8));
    assert!(matches!(engine.reserve(spec(prompt(1, 38), 2)).await, Err(Refused::Full(_))), "8 are left");
    let other = engine.reserve(spec(prompt(1, 30), 2)).await.expect("nobody else is in the way");
    drop(quarantine);
    let counts = engine.check_pool().await.expect("consistent");
    assert_eq!((counts.held, counts.quarantined, counts.free), (8, 0, 2));
    drop(other);
    assert_idle(&engine).await;
}

#[tokio::test]
async fn a_forced_token_is_told_and_never_sampled() {
    let engine = start(small(), role(Role::Prefill));
    let forced = SequenceSpec { forced: Some(42), ..spec(prompt(1, 21), 5) };
    let mut running = engine.prefill(forced.clone()).await.expect("taken");
    let mut offered = 0;
    let token = loop {
        match running.events.recv().await.expect("goes on") {
            Event::Computed { blocks, .. } => offered += blocks.len(),
            Event::Token { position, token, .. } => break (position, token),
            _ => {}
        }
    };
    assert_eq!((offered, token), (6, (21, SampledToken { id: 42, logprobs: None })));
    let mut last = engine.prefill(SequenceSpec { max_tokens: 1, ..forced }).await.expect("taken");
    let finish = loop {
        if let Event::Finished(finish) = last.events.recv().await.expect("it ends") {
            break finish;
        }
    };
    assert_eq!(finish, Finish::Length);
    drop((running, last));
    assert_idle(&engine).await;
}

#[tokio::test]
async fn a_forced_token_is_not_forced_again_on_decode() {
    let (prefill, decode) = pair(64);
    let plain = spec(prompt(1, 9), 6);
    let (tokens, finish) = answer(&plain);
    let reservation = decode.reserve(SequenceSpec { forced: Some(tokens[0].id), ..plain.clone() }).await;
    let reservation = reservation.expect("room");
    deliver(&prefill, &decode, &plain, &reservation).await;
    let heard = listen(&mut reservation.activate(FirstToken(tokens[0].id)).await, 10).await;
    assert_eq!((&heard.tokens[..], heard.end), (&tokens[1..], Some(End::Finished(finish))));
}

#[tokio::test]
async fn a_first_token_that_ends_the_sequence_ends_it_on_decode_too() {
    let engine = start(small(), role(Role::Decode));
    for (max_tokens, first, finish) in [(1, 5, Finish::Length), (9, 3, Finish::Stop(3))] {
        let reservation = engine.reserve(spec(prompt(1, 9), max_tokens)).await.expect("room");
        let heard = listen(&mut reservation.activate(FirstToken(first)).await, 10).await;
        assert_eq!((heard.tokens.len(), heard.end), (0, Some(End::Finished(finish))));
    }
    let reservation = engine.reserve(spec(prompt(1, 9), 9)).await.expect("room");
    let heard = listen(&mut reservation.activate(FirstToken(VOCAB)).await, 10).await;
    assert!(matches!(heard.end, Some(End::Failed(_))));
    assert_idle(&engine).await;
}
