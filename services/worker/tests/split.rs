//! Prefill and decode as two workers with the demo model: the answers of one worker, and nothing left behind.

mod fixture;
mod integrity;

use fixture::*;
use proto::{
    ErrorCode, FinishReason, Member, Sequence, Token, decode_event::Event as Decode,
    prefill_event::Event as Prefill,
};
use std::time::Duration;
use tokio::{net::TcpListener, time::timeout};
use worker::Role;

#[tokio::test(flavor = "multi_thread")]
async fn golden_answers_come_out_word_for_word_however_they_are_served() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    for (index, (prompt, expected)) in golden().into_iter().step_by(12).enumerate() {
        let sequence = sequence(&prompt, 100);
        let answer = split(&prefill.member, &decode.member, &sequence).await;
        assert_eq!(answer.ids(), expected, "question {index}");
        let stop = proto::DecodeFinished { reason: FinishReason::Stop as i32, stop_token: Some(1) };
        assert_eq!(answer.finished, stop);
        let (tokens, finished) = whole(&both.member, &sequence).await;
        assert_eq!((tokens, finished), (answer.tokens, answer.finished), "logprobs included");
    }
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_overlap_and_prefixes_are_neither_computed_nor_sent_twice() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    let sequence = sequence(&long_prompt(603), 20);
    let (expected, _) = whole(&both.member, &sequence).await;
    let block = 5 * 576 * 4 * 8;
    let first = split(&prefill.member, &decode.member, &sequence).await;
    assert_eq!(first.tokens, expected);
    assert_eq!((first.present, first.cached_tokens), (0, 0));
    assert_eq!((first.delivered.blocks, first.delivered.bytes), (76, block * 75 + block * 3 / 8));
    let again = split(&prefill.member, &decode.member, &sequence).await;
    assert_eq!(again.tokens, expected);
    assert_eq!((again.present, again.cached_tokens), (75, 600));
    assert_eq!((again.delivered.blocks, again.delivered.bytes), (1, block * 3 / 8));
    let metrics = decode.get("/metrics").await;
    let total = first.delivered.bytes + again.delivered.bytes;
    let line = format!("baton_handoff_bytes_total{{transport=\"grpc\"}} {total}");
    assert!(metrics.contains(&line), "{line} is missing from\n{metrics}");
    assert!(metrics.contains(r#"baton_handoffs_total{outcome="complete"} 2"#), "{metrics}");
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_token_that_ends_the_sequence_ends_both_sides() {
    let cluster = Cluster::start().await;
    let [prefill, decode] = cluster.workers([Role::Prefill, Role::Decode]).await;
    let (prompt, expected) = golden().swap_remove(0);
    let answer = split(&prefill.member, &decode.member, &sequence(&prompt, 1)).await;
    assert_eq!(answer.ids(), expected[..1]);
    assert_eq!(answer.finished.reason, FinishReason::Length as i32);
    assert_eq!(answer.delivered.finished, Some(FinishReason::Length as i32));
    prefill.assert_idle().await;
    decode.assert_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_prefill_is_fenced_and_another_goes_on_from_what_was_accepted() {
    let cluster = Cluster::start().await;
    let [lost, other] = cluster.workers([Role::Prefill, Role::Prefill]).await;
    let decode =
        cluster.launch(worker::Config { kv_blocks: Some(600), ..cluster.config(Role::Decode) }).await;
    let Fenced { sequence, mut decoding, reserved, advanced } = fenced(&lost, &decode).await;
    assert_eq!((reserved.blocks_present, reserved.blocks_needed), (0, 225));
    assert_eq!(advanced.epoch, reserved.epoch + 1);
    let request = proto::PrefillRequest {
        epoch: advanced.epoch,
        blocks_accepted: advanced.accepted.clone(),
        ..prefill_request(&sequence, &decode.member, &reserved)
    };
    let mut second = fixture::prefill(&other.member, request).await;
    let (prefilled, (rest, _)) = tokio::join!(second.end(), decoding.rest());
    let prefilled = prefilled.unwrap();
    assert_eq!(prefilled.delivered.blocks as usize, 225 - advanced.accepted.len());
    let answer: Vec<_> = prefilled.first.into_iter().chain(rest).collect();
    // The same request undisturbed.
    let again = split(&lost.member, &decode.member, &sequence).await;
    assert_eq!(again.tokens, answer);
    for worker in [lost, other, decode] {
        worker.assert_idle().await;
    }
}

/// A request whose prefill was given up while it computed.
struct Fenced {
    sequence: Sequence,
    decoding: Decoding,
    reserved: proto::Reserved,
    advanced: proto::Advanced,
}

/// With blocks that were accepted before: delivery overlaps computing. On a busy machine the moment between the first block
/// and the last can be missed; then it is tried again.
async fn fenced(lost: &Worker, decode: &Worker) -> Fenced {
    for first in 3..23 {
        let mut sequence = sequence(&long_prompt(1800), 10);
        // Another first token each time, so that decode's prefix cache has nothing.
        sequence.tokens[0] = first;
        if let Some(fenced) = try_fence(lost, decode, sequence).await {
            return fenced;
        }
        lost.assert_idle().await;
        decode.assert_idle().await;
    }
    panic!("in none of 20 requests was a block accepted before all were")
}

async fn try_fence(lost: &Worker, decode: &Worker, sequence: Sequence) -> Option<Fenced> {
    let begun = lost.pool().await["step"].as_u64();
    let mut decoding = generate(&decode.member, &sequence, false).await;
    let reserved = decoding.reserved().await;
    let request = prefill_request(&sequence, &decode.member, &reserved);
    let mut prefilling = fixture::prefill(&lost.member, request).await;
    assert!(matches!(prefilling.next().await, Prefill::Started(_)));
    lost.eventually("three steps on", |pool| pool["step"].as_u64() >= begun.map(|step| step + 3)).await;
    let advanced = decoding.advance(reserved.reservation, reserved.epoch).await?;
    if advanced.accepted.is_empty() {
        return None;
    }
    let error = prefilling.end().await.expect_err("fenced");
    assert_eq!(error.code(), ErrorCode::StaleEpoch, "{error}");
    Some(Fenced { sequence, decoding, reserved, advanced })
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_in_any_phase_leaves_nothing_behind() {
    let cluster = Cluster::start().await;
    let [prefill, decode] = cluster.workers([Role::Prefill, Role::Decode]).await;
    for phase in 0..6 {
        let mut tokens = long_prompt(700);
        tokens[0] = 10 + phase;
        let sequence = sequence(&tokens, 200);
        let mut decoding = generate(&decode.member, &sequence, false).await;
        if phase == 0 {
            continue;
        }
        let reserved = decoding.reserved().await;
        // The phases before this one leave nothing: only this reservation remains.
        decode.eventually("holding one reservation", |pool| pool["reserved"] == 1).await;
        if phase == 1 {
            continue;
        }
        let request = prefill_request(&sequence, &decode.member, &reserved);
        let mut prefilling = fixture::prefill(&prefill.member, request).await;
        assert!(matches!(prefilling.next().await, Prefill::Started(_)));
        match phase {
            // The router leaves while prompts compute and blocks travel.
            2 => tokio::time::sleep(Duration::from_millis(30)).await,
            // Only decode's side is dropped: prefill hears it from decode.
            3 => {
                drop(decoding);
                let error = prefilling.end().await.expect_err("nobody takes the blocks");
                assert!(
                    matches!(error.code(), ErrorCode::PeerLost | ErrorCode::UnknownReservation),
                    "{error}"
                );
            }
            4 => assert!(matches!(prefilling.next().await, Prefill::FirstToken(_))),
            _ => while !matches!(decoding.next().await, Decode::Token(_)) {},
        }
    }
    prefill.assert_idle().await;
    decode.assert_idle().await;
}

/// As a router does it: tries again where there was no room, goes on elsewhere after a preemption.
async fn persist(prefill_on: &Member, decode_on: &Member, mut sequence: Sequence) -> (Vec<Token>, u32) {
    let (mut answer, mut preemptions): (Vec<Token>, u32) = (Vec::new(), 0);
    loop {
        let mut decoding = generate(decode_on, &sequence, false).await;
        let reserved = match decoding.next().await {
            Decode::Reserved(reserved) => reserved,
            Decode::Error(error) if error.code() == ErrorCode::NoCapacity => {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
            other => panic!("{other:?}"),
        };
        let request = prefill_request(&sequence, decode_on, &reserved);
        let prefilled = fixture::prefill(prefill_on, request).await.end().await.unwrap();
        answer.extend(prefilled.first);
        loop {
            match decoding.next().await {
                Decode::Decoding(_) => {}
                Decode::Token(token) => answer.push(token),
                Decode::Finished(_) => return (answer, preemptions),
                Decode::Preempted(_) => break,
                other => panic!("{other:?}"),
            }
        }
        preemptions += 1;
        sequence.tokens.truncate(sequence.prompt_len as usize);
        sequence.tokens.extend(answer.iter().map(|token| token.id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn preempted_sequences_go_on_bit_for_bit() {
    let cluster = Cluster::start().await;
    let [prefill, both] = cluster.workers([Role::Prefill, Role::Both]).await;
    let config =
        worker::Config { kv_blocks: Some(44), max_reserved_share: 1.0, ..cluster.config(Role::Decode) };
    let decode = cluster.launch(config).await;
    let seeded = |seed: u64| {
        let mut sequence = sequence(&golden()[seed as usize].0, 70);
        let sampling = sequence.sampling.as_mut().unwrap();
        (sampling.temperature, sampling.seed, sampling.frequency_penalty) = (1.0, seed, 0.3);
        sequence.stop.as_mut().unwrap().ignore_eos = true;
        sequence
    };
    let answers = (0..8).map(|seed| persist(&prefill.member, &decode.member, seeded(seed)));
    let answers = futures::future::join_all(answers).await;
    for (seed, (answer, _)) in (0..).zip(&answers) {
        assert_eq!(*answer, whole(&both.member, &seeded(seed)).await.0, "seed {seed}");
    }
    assert!(answers.iter().any(|(_, preemptions)| *preemptions > 0), "the pool was too large for this test");
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_refused_before_any_work() {
    let cluster = Cluster::start().await;
    let [prefill, decode] = cluster.workers([Role::Prefill, Role::Decode]).await;
    let good = sequence(&[0, 3, 357], 5);
    let reserved = proto::Reserved { reservation: 1, epoch: 1, ..Default::default() };
    let request = || prefill_request(&good, &decode.member, &reserved);
    let unknown = || proto::PrefillRequest { reservation: 99, ..request() };
    for (on, request, code, part) in [
        (
            &prefill,
            proto::PrefillRequest { decode_weights: 1, ..request() },
            ErrorCode::Mismatch,
            "weights of the decode",
        ),
        (
            &prefill,
            proto::PrefillRequest { decode_layout: 1, ..request() },
            ErrorCode::Mismatch,
            "KV layout of the decode",
        ),
        (
            &prefill,
            proto::PrefillRequest { blocks_present: 9, ..request() },
            ErrorCode::InvalidRequest,
            "blocks_present",
        ),
        (
            &prefill,
            proto::PrefillRequest { sequence: None, ..request() },
            ErrorCode::InvalidRequest,
            "`sequence`",
        ),
        (&prefill, unknown(), ErrorCode::UnknownReservation, "no reservation 99"),
        (&decode, request(), ErrorCode::InvalidRequest, "role decode"),
    ] {
        let error = fixture::prefill(&on.member, request).await.end().await.expect_err("must be refused");
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message.contains(part), "{error}");
    }
    let mut bad = good.clone();
    bad.tokens[1] = 1 << 20;
    for (on, sequence, here, code, part) in [
        (&decode, &bad, false, ErrorCode::InvalidRequest, "sequence.tokens"),
        (&decode, &good, true, ErrorCode::InvalidRequest, "no whole sequences"),
        (&prefill, &good, false, ErrorCode::InvalidRequest, "decodes nothing"),
        (&decode, &sequence(&vec![5; 5000], 5), false, ErrorCode::ContextLength, "2048"),
    ] {
        let Decode::Error(error) = generate(&on.member, sequence, here).await.next().await else {
            panic!("must be refused: {part}")
        };
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message.contains(part), "{error}");
    }
    prefill.assert_idle().await;
    decode.assert_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let cluster = Cluster::start().await;
    let patient = worker::Config { drain_ms: 60_000, ..cluster.config(Role::Both) };
    let mut both = cluster.launch(patient).await;
    let (prompt, _) = golden().swap_remove(7);
    // Lasts longer than it takes to ask for something new.
    let mut long = sequence(&prompt, 300);
    long.stop.as_mut().unwrap().ignore_eos = true;
    let expected = whole(&both.member, &long).await;
    let mut running = generate(&both.member, &long, true).await;
    assert!(matches!(running.next().await, Decode::LocalPrefill(_)));
    let mut late = generate(&both.member, &sequence(&prompt, 2), true).await;
    late.rest().await;
    both.tell_to_stop();
    let refused = refusal_of_leaving(&both, &prompt).await;
    assert_eq!(running.rest().await, expected);
    both.ended().await.unwrap();
    assert!(matches!(refused, None | Some(ErrorCode::Draining)), "{refused:?}");
}

/// What runs too long goes on elsewhere; what is computed and on offer is still delivered.
#[tokio::test(flavor = "multi_thread")]
async fn draining_moves_what_lasts_too_long() {
    let cluster = Cluster::start().await;
    let mut impatient = cluster.config(Role::Both);
    impatient.drain_ms = 50;
    let mut both = cluster.launch(impatient).await;
    let mut unending = sequence(&long_prompt(30), 1900);
    unending.stop.as_mut().unwrap().ignore_eos = true;
    let mut running = generate(&both.member, &unending, true).await;
    while !matches!(running.next().await, Decode::Token(_)) {}
    both.tell_to_stop();
    let error = loop {
        match running.next().await {
            Decode::Token(_) => {}
            Decode::Error(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(error.code(), ErrorCode::Draining, "{error}");
    both.ended().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_incarnation_that_is_meant_takes_work() {
    let cluster = Cluster::start().await;
    let both = cluster.worker(Role::Both).await;
    let former = Member { id: "both-former".into(), ..both.member.clone() };
    let Decode::Error(error) = generate(&former, &sequence(&[5, 6], 3), true).await.next().await else {
        panic!("must be refused")
    };
    assert_eq!(error.code(), ErrorCode::Draining);
    assert!(error.message.contains("member both-former has left this address"), "{error}");
}

/// The code of the refusal once the worker says that it leaves; `None` if it has gone by then.
async fn refusal_of_leaving(worker: &Worker, prompt: &[u32]) -> Option<ErrorCode> {
    while !worker.try_ask("GET", "/ready").await.ok()?.contains("leaving the cluster") {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    match try_generate(&worker.member, &sequence(prompt, 1), true).await.ok()?.next().await {
        Decode::Error(error) => Some(error.code()),
        other => panic!("{other:?}"),
    }
}

/// These tests are built without the feature `cuda`.
#[tokio::test]
async fn a_backend_that_this_build_has_not_is_named() {
    let cluster = Cluster::start().await;
    for (backend, why) in
        [("tpu", "no backend `tpu`; there are: cpu, cuda, sim"), ("cuda", "--features cuda")]
    {
        let config = worker::Config { backend: backend.into(), ..cluster.config(Role::Both) };
        let error = worker::run(config, std::future::pending()).await.expect_err("no such backend");
        assert!(error.to_string().contains(why), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_goes_to_members_alone() {
    let cluster = Cluster::start().await;
    let [prefill, decode] = cluster.workers([Role::Prefill, Role::Decode]).await;
    let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let elsewhere = format!("http://{}", door.local_addr().unwrap());
    let refused = prefill.ask("POST", &format!("/probe?to={elsewhere}&mib=1")).await;
    assert!(refused.starts_with("HTTP/1.1 404") && refused.contains("of no member"), "{refused}");
    let knocked = timeout(Duration::from_millis(300), door.accept()).await;
    assert!(knocked.is_err(), "nobody comes there");
    let probed = prefill.ask("POST", &format!("/probe?to={}&mib=1", decode.member.address)).await;
    assert!(probed.starts_with("HTTP/1.1 200") && probed.contains(&decode.member.id), "{probed}");
}
