//! A request against scripted workers: every token exactly once, every call ended, every credit returned.

use super::Life;
use crate::{
    admission::Ticket,
    config::ms,
    fakes::{Bench, DecodeScript as D, PrefillScript as P, collect, config, request},
    service::Events,
};
use futures::StreamExt;
use proto::{ErrorCode, GenerateRequest, Load, Member, Role, Sequence, generate_event::Event};
use std::time::Duration;
use tokio::{
    sync::mpsc,
    time::{Instant, advance, sleep, timeout},
};

const PAIR: [(&str, Role); 2] = [("p1", Role::Prefill), ("d1", Role::Decode)];
const TWO_PAIRS: [(&str, Role); 4] =
    [("p1", Role::Prefill), ("p2", Role::Prefill), ("d1", Role::Decode), ("d2", Role::Decode)];
const PROMPT: u32 = 10;
const OUTPUT: u32 = 8;

/// Runs one request over the script; its answer must be whole and everything given back.
async fn whole(workers: &[(&str, Role)], decode: &[D], prefill: &[P]) -> Bench {
    let bench = Bench::start(config(), workers).await;
    bench.script(decode, prefill);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    bench.quiet().await;
    bench
}

/// Ids of the workers that were asked to decode, and how many tokens they were given.
fn decodes(bench: &Bench) -> Vec<(String, usize)> {
    let asked = bench.world.decodes.lock().unwrap();
    asked.iter().map(|(id, sequence, _)| (id.clone(), sequence.tokens.len())).collect()
}

fn prefills(bench: &Bench) -> Vec<(String, u32, Vec<u32>, Option<u32>)> {
    let asked = bench.world.prefills.lock().unwrap();
    let view = |(id, request): &(String, proto::PrefillRequest)| {
        let forced = request.forced.as_ref().map(|token| token.id);
        (id.clone(), request.epoch, request.blocks_accepted.clone(), forced)
    };
    asked.iter().map(view).collect()
}

#[tokio::test]
async fn prefilled_here_and_decoded_there() {
    let bench = Bench::start(config(), &PAIR).await;
    let answer = bench.answer(PROMPT, OUTPUT).await;
    answer.is_whole(PROMPT, OUTPUT);
    let started = &answer.started[0];
    assert_eq!((started.cached_tokens, started.attempt), (4, 1));
    assert_eq!((started.prefill_member.as_str(), started.decode_member.as_str()), ("p1", "d1"));
    let asked = bench.world.prefills.lock().unwrap()[0].1.clone();
    assert_eq!(asked.decode_address, bench.members[1].address);
    assert_eq!((asked.epoch, asked.blocks_present), (1, 1));
    bench.quiet().await;
}

/// Of 8 MB each: with what a connection had room for, four were enough.
#[tokio::test]
async fn streams_that_nobody_reads_hold_up_nobody_else() {
    let bench = Bench::start(config(), &PAIR).await;
    let load = Load { blocks_total: 10_000, blocks_free: 10_000, ..Load::default() };
    let roomy = |member: &Member| Member { max_sequences: 64, load: Some(load), ..member.clone() };
    bench.view(&bench.members.iter().map(roomy).collect::<Vec<_>>());
    bench.script(&[D::Wide; 12], &[]);
    let mut unread = Vec::new();
    for _ in 0..12 {
        unread.push(bench.ask(request(PROMPT, 300)).await.unwrap());
    }
    while decodes(&bench).len() < 12 {
        sleep(Duration::from_millis(20)).await;
    }
    sleep(Duration::from_secs(1)).await;
    for _ in 0..2 {
        let answer = timeout(Duration::from_secs(20), bench.answer(PROMPT, OUTPUT)).await;
        answer.expect("its tokens wait for streams that nobody reads").is_whole(PROMPT, OUTPUT);
    }
    drop(unread);
    bench.quiet().await;
}

#[tokio::test]
async fn one_token_is_an_answer_too() {
    let bench = Bench::start(config(), &PAIR).await;
    bench.answer(PROMPT, 1).await.is_whole(PROMPT, 1);
    bench.quiet().await;
}

#[tokio::test]
async fn role_both_does_everything_alone() {
    let bench = whole(&[("b", Role::Both)], &[D::Die(3)], &[]).await;
    let asked = bench.world.decodes.lock().unwrap();
    assert!(asked.iter().all(|(_, _, here)| *here));
    assert_eq!(asked.iter().map(|(_, sequence, _)| sequence.tokens.len()).collect::<Vec<_>>(), [10, 13]);
    assert!(bench.world.prefills.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_refused_reservation_is_tried_elsewhere_and_again() {
    let full = D::Refuse(ErrorCode::NoCapacity);
    let bench = whole(&TWO_PAIRS, &[full], &[]).await;
    assert_eq!(decodes(&bench), [("d1".into(), 10), ("d2".into(), 10)]);
    let mut patient = config();
    patient.attempts = 1;
    let bench = Bench::start(patient, &PAIR).await;
    bench.script(&[full, full, full], &[]);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    assert_eq!(decodes(&bench).len(), 4, "refusals are not failed attempts");
}

#[tokio::test]
async fn a_prefill_lost_before_the_first_token_is_replaced_on_the_same_reservation() {
    let failed = [ErrorCode::Internal, ErrorCode::Digest].map(P::Fail);
    for script in [P::DieBeforeFirst, P::Silent].into_iter().chain(failed) {
        let bench = whole(&TWO_PAIRS, &[], &[script]).await;
        let expected = [("p1".into(), 1, vec![], None), ("p2".into(), 2, vec![1], None)];
        assert_eq!(prefills(&bench), expected, "{script:?}");
        assert_eq!(decodes(&bench).len(), 1);
    }
}

#[tokio::test]
async fn a_first_token_that_the_client_has_is_forced_never_repeated() {
    let bench = whole(&TWO_PAIRS, &[], &[P::DieAfterFirst]).await;
    let expected = [("p1".into(), 1, vec![], None), ("p2".into(), 2, vec![1], Some(1000 + PROMPT))];
    assert_eq!(prefills(&bench), expected);
    let asked = bench.world.prefills.lock().unwrap();
    let again = asked[1].1.clone();
    assert_eq!(again.sequence.unwrap().tokens.len(), PROMPT as usize);
    assert_eq!(again.forced.unwrap().position, PROMPT);
}

#[tokio::test]
async fn a_prefill_that_dies_when_decode_has_everything_costs_nothing() {
    for script in [P::DieUnheard, P::DieDelivered] {
        let bench = whole(&TWO_PAIRS, &[], &[script]).await;
        assert_eq!((prefills(&bench).len(), decodes(&bench).len()), (1, 1), "{script:?}");
    }
}

#[tokio::test]
async fn prompt_logprobs_come_once_and_before_the_first_token() {
    for script in [P::Well, P::Late, P::DieUnheard, P::DieAfterFirst] {
        let bench = Bench::start(config(), &TWO_PAIRS).await;
        bench.script(&[], &[script]);
        let mut scored = request(PROMPT, OUTPUT);
        scored.sequence.as_mut().unwrap().sampling.as_mut().unwrap().prompt_logprobs = Some(1);
        let answer = collect(bench.ask(scored).await.unwrap()).await;
        answer.is_whole(PROMPT, OUTPUT);
        assert_eq!(answer.prompt_logprobs, (1..PROMPT).collect::<Vec<_>>(), "{script:?}");
        bench.quiet().await;
    }
}

#[tokio::test]
async fn a_decode_that_does_not_answer_an_advance_is_given_up() {
    let bench = whole(&TWO_PAIRS, &[D::Deaf], &[P::DieBeforeFirst]).await;
    assert_eq!(decodes(&bench), [("d1".into(), 10), ("d2".into(), 10)]);
}

#[tokio::test]
async fn two_first_tokens_for_one_answer_end_it() {
    let bench = Bench::start(config(), &PAIR).await;
    bench.script(&[], &[P::Contradict]);
    assert_eq!(bench.answer(PROMPT, OUTPUT).await.code(), ErrorCode::Internal);
    bench.quiet().await;
}

#[tokio::test]
async fn a_decode_that_cannot_read_from_its_prefill_has_both_avoided() {
    let bench = whole(&TWO_PAIRS, &[D::Unread], &[P::Busy]).await;
    assert_eq!(decodes(&bench), [("d1".into(), 10), ("d2".into(), 10)]);
    assert_eq!(prefills(&bench).iter().map(|asked| asked.0.as_str()).collect::<Vec<_>>(), ["p1", "p2"]);
}

#[tokio::test]
async fn an_answer_goes_on_elsewhere_after_decode_is_lost() {
    for script in [D::Die(3), D::Silent(3), D::Stuck(3), D::Fail(3, ErrorCode::Internal)] {
        let bench = whole(&TWO_PAIRS, &[script], &[]).await;
        assert_eq!(decodes(&bench), [("d1".into(), 10), ("d2".into(), 14)], "{script:?}");
        let asked = bench.world.decodes.lock().unwrap();
        assert_eq!(asked[1].1.prompt_len, PROMPT);
        assert_eq!(asked[1].1.tokens[10..], [1010, 1011, 1012, 1013]);
    }
}

#[tokio::test]
async fn a_decode_lost_after_the_last_token_costs_nothing() {
    let bench = whole(&PAIR, &[D::Die(OUTPUT - 1)], &[]).await;
    assert_eq!(decodes(&bench).len(), 1);
    let bench = whole(&PAIR, &[D::Die(0), D::Die(0), D::Die(0)], &[]).await;
    assert_eq!(decodes(&bench).len(), 4);
}

#[tokio::test]
async fn preemption_moves_the_sequence_and_counts_as_no_failure() {
    let mut strict = config();
    strict.attempts = 1;
    let bench = Bench::start(strict, &PAIR).await;
    bench.script(&[D::Preempt(1), D::Preempt(1), D::Preempt(0)], &[]);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    assert_eq!(decodes(&bench).iter().map(|(_, tokens)| *tokens).collect::<Vec<_>>(), [10, 12, 14, 15]);
    bench.quiet().await;
}

#[tokio::test]
async fn a_worker_that_leaves_is_no_failure() {
    let mut strict = config();
    strict.attempts = 1;
    for (decode, prefill, asked) in
        [(D::Fail(3, ErrorCode::Draining), P::Well, (2, 2)), (D::Well, P::Fail(ErrorCode::Draining), (1, 2))]
    {
        let bench = Bench::start(strict.clone(), &TWO_PAIRS).await;
        bench.script(&[decode], &[prefill]);
        bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
        assert_eq!((decodes(&bench).len(), prefills(&bench).len()), asked, "{decode:?} {prefill:?}");
        bench.quiet().await;
    }
}

#[tokio::test]
async fn decode_is_asked_before_prefill_is_blamed_for_a_broken_delivery() {
    let mut strict = config();
    strict.attempts = 2;
    let lost = P::Fail(ErrorCode::PeerLost);
    // Decode lives: another prefill member may get through to it.
    let bench = Bench::start(strict.clone(), &TWO_PAIRS).await;
    bench.script(&[], &[lost]);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    assert_eq!(decodes(&bench).len(), 1);
    assert_eq!(prefills(&bench).iter().map(|asked| asked.0.as_str()).collect::<Vec<_>>(), ["p1", "p2"]);
    // Decode does not answer: one failure, and it is not prefill's.
    let bench = Bench::start(strict, &TWO_PAIRS).await;
    bench.script(&[D::Deaf], &[lost]);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    assert_eq!(decodes(&bench), [("d1".into(), 10), ("d2".into(), 10)]);
    bench.quiet().await;
}

#[tokio::test]
async fn two_that_cannot_reach_each_other_do_not_meet_again() {
    let bench = Bench::start(config(), &[TWO_PAIRS[0], TWO_PAIRS[2], TWO_PAIRS[3]]).await;
    bench.script(&[], &[P::Fail(ErrorCode::PeerLost)]);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    assert_eq!(decodes(&bench), [("d1".into(), 10), ("d2".into(), 10)]);
    bench.quiet().await;
}

#[tokio::test]
async fn a_lone_worker_gets_time_to_recover() {
    let mut patient = config();
    patient.members.retry_ms = 50;
    let bench = Bench::start(patient, &PAIR).await;
    let error = D::Refuse(ErrorCode::Internal);
    bench.script(&[error; 4], &[]);
    let start = Instant::now();
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    assert!(start.elapsed() >= Duration::from_millis(50 + 100 + 200 + 400), "{:?}", start.elapsed());
    bench.quiet().await;
}

#[tokio::test]
async fn what_another_router_began_goes_on_and_first() {
    let bench = Bench::start(config(), &PAIR).await;
    let mut begun = request(PROMPT, OUTPUT);
    let sequence = begun.sequence.as_mut().unwrap();
    sequence.tokens.extend([1010, 1011]);
    let answer = collect(bench.ask(begun).await.unwrap()).await;
    assert_eq!(
        answer.tokens.iter().map(|token| token.id).collect::<Vec<_>>(),
        [1012, 1013, 1014, 1015, 1016, 1017]
    );
    let mut over = request(PROMPT, 2);
    over.sequence.as_mut().unwrap().tokens.extend([1010, 1011]);
    let answer = collect(bench.ask(over).await.unwrap()).await;
    assert!(answer.finished && answer.tokens.is_empty(), "its last token was there, its end was not");
    bench.quiet().await;
}

#[tokio::test]
async fn attempts_are_bounded_and_the_last_error_is_told() {
    let mut twice = config();
    twice.attempts = 2;
    let bench = Bench::start(twice, &TWO_PAIRS).await;
    bench.script(&[D::Die(0), D::Die(0)], &[]);
    let answer = bench.answer(PROMPT, OUTPUT).await;
    assert_eq!(answer.code(), ErrorCode::WorkerLost);
    assert!(answer.error.unwrap().message.contains("after 2 failed placements"));
    bench.quiet().await;
}

#[tokio::test]
async fn what_cannot_succeed_elsewhere_is_not_tried_elsewhere() {
    for (decode, prefill) in [
        (D::Refuse(ErrorCode::InvalidRequest), P::Well),
        (D::Fail(2, ErrorCode::InvalidRequest), P::Well),
        (D::Well, P::Fail(ErrorCode::InvalidRequest)),
    ] {
        let bench = Bench::start(config(), &TWO_PAIRS).await;
        bench.script(&[decode], &[prefill]);
        let answer = bench.answer(PROMPT, OUTPUT).await;
        assert_eq!(answer.code(), ErrorCode::InvalidRequest);
        assert_eq!(decodes(&bench).len(), 1);
        bench.quiet().await;
    }
}

#[tokio::test]
async fn a_repeated_token_never_reaches_the_client() {
    let bench = Bench::start(config(), &PAIR).await;
    bench.script(&[D::Repeat(3)], &[]);
    let answer = bench.answer(PROMPT, OUTPUT).await;
    assert_eq!((answer.code(), answer.tokens.len()), (ErrorCode::Internal, 4));
    bench.quiet().await;
}

#[tokio::test]
async fn an_unreachable_worker_is_passed_over() {
    let bench = Bench::start(config(), &TWO_PAIRS).await;
    let mut members = bench.members.clone();
    members[0].address = "http://127.0.0.1:1".into();
    members[2].address = "http://127.0.0.1:1".into();
    bench.view(&members);
    bench.answer(PROMPT, OUTPUT).await.is_whole(PROMPT, OUTPUT);
    bench.quiet().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_everything_at_once() {
    for prefill in [P::Well, P::Busy] {
        let bench = Bench::start(config(), &PAIR).await;
        bench.script(&[D::Stuck(2)], &[prefill]);
        let mut events = bench.ask(request(PROMPT, OUTPUT)).await.unwrap();
        while bench.world.active() < 1 {
            events.next().await;
        }
        drop(events);
        bench.quiet().await;
    }
}

#[tokio::test]
async fn a_request_waits_for_its_members_but_not_for_ever() {
    let bench = Bench::start(config(), &PAIR).await;
    bench.view(&[]);
    let mut hasty = request(PROMPT, OUTPUT);
    hasty.queue_timeout_ms = 100;
    let answer = collect(bench.ask(hasty).await.unwrap()).await;
    assert_eq!(answer.code(), ErrorCode::NoMembers);
    let mut waiting = bench.ask(request(PROMPT, OUTPUT)).await.unwrap();
    for _ in 0..3 {
        let event = waiting.next().await.unwrap().unwrap().event;
        assert!(matches!(event, Some(Event::Heartbeat(_))), "the gateway hears that we live, not {event:?}");
    }
    assert_eq!(bench.shared.admission.depths().values().sum::<u32>(), 1);
    bench.view(&bench.members);
    collect(waiting).await.is_whole(PROMPT, OUTPUT);
    bench.quiet().await;
}

/// A cluster of one place, which a request has for as long as its events are kept, and of two in the queue.
async fn taken() -> (Bench, Events) {
    let mut narrow = config();
    (narrow.running, narrow.queue.limit) = (1, 2);
    let bench = Bench::start(narrow, &PAIR).await;
    bench.script(&[], &[P::Busy]);
    let mut blocking = bench.ask(request(PROMPT, OUTPUT)).await.unwrap();
    while !matches!(blocking.next().await.unwrap().unwrap().event.unwrap(), Event::Started(_)) {}
    (bench, blocking)
}

#[tokio::test]
async fn a_full_cluster_keeps_requests_in_order_and_a_full_queue_says_so() {
    let (bench, blocking) = taken().await;
    let mut waiting = Vec::new();
    for priority in [1, 0] {
        let mut request = request(PROMPT + priority as u32, OUTPUT);
        request.sequence.as_mut().unwrap().priority = priority;
        waiting.push(bench.ask(request).await.unwrap());
        sleep(Duration::from_millis(20)).await;
    }
    let refused = bench.answer(PROMPT, OUTPUT).await;
    assert_eq!(refused.code(), ErrorCode::QueueFull);
    drop(blocking);
    for (events, prompt) in waiting.into_iter().zip([PROMPT + 1, PROMPT]) {
        collect(events).await.is_whole(prompt, OUTPUT);
    }
    assert_eq!(decodes(&bench).iter().map(|(_, tokens)| *tokens).collect::<Vec<_>>(), [10, 10, 11]);
    bench.quiet().await;
}

#[tokio::test]
async fn who_loses_its_place_in_a_full_queue_to_another_tenant_hears_it() {
    let (bench, blocking) = taken().await;
    let mut waiting = Vec::new();
    for tenant in ["flood", "flood", "quiet"] {
        let request = GenerateRequest { tenant: tenant.into(), ..request(PROMPT, OUTPUT) };
        waiting.push(bench.ask(request).await.unwrap());
        sleep(Duration::from_millis(20)).await;
    }
    let displaced = collect(waiting.remove(1)).await;
    assert_eq!(displaced.code(), ErrorCode::QueueFull);
    assert_eq!(bench.shared.admission.depths()[&0], 2);
    drop(blocking);
    for events in waiting {
        collect(events).await.is_whole(PROMPT, OUTPUT);
    }
    bench.quiet().await;
}

/// A place in the queue for a request of this class that comes now, and has run for `ran` when it joins.
async fn ticket(bench: &Bench, priority: i32, ran: Option<Duration>) -> Ticket {
    let mut request = request(PROMPT, OUTPUT);
    let sequence = Sequence { priority, ..request.sequence.take().unwrap() };
    let trace = bench.shared.spans.context(None);
    let mut life = Life::new(bench.shared.clone(), request, sequence, mpsc::channel(1).0, trace);
    if let Some(ran) = ran {
        life.permit = Some(bench.shared.admission.run_unplaced());
        life.place.resumed = true;
        advance(ran).await;
    }
    life.queue(None).unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_time_that_a_moved_sequence_ran_does_not_age_its_class() {
    let mut narrow = config();
    narrow.prefill.requests = 1;
    let ran = ms(narrow.queue.ageing_ms) * 10;
    let bench = Bench::start(narrow, &PAIR).await;
    bench.view(&[]);
    let mut moved = ticket(&bench, 1, Some(ran)).await;
    let mut urgent = ticket(&bench, 0, None).await;
    bench.view(&bench.members);
    tokio::select! {
        _ = moved.offer() => panic!("the moved one overtakes a higher class"),
        offer = urgent.offer() => assert!(offer.is_ok()),
    }
}

#[tokio::test]
async fn waiting_for_room_ends_with_the_deadline() {
    let mut narrow = config();
    narrow.prefill.requests = 1;
    let bench = Bench::start(narrow, &PAIR).await;
    bench.script(&[], &[P::Busy]);
    let blocking = bench.ask(request(PROMPT, OUTPUT)).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    let mut hasty = request(PROMPT, OUTPUT);
    hasty.queue_timeout_ms = 100;
    let answer = collect(bench.ask(hasty).await.unwrap()).await;
    assert_eq!(answer.code(), ErrorCode::Deadline);
    assert!(answer.error.unwrap().message.contains("prefill"));
    drop(blocking);
    bench.quiet().await;
}

/// One decode member is large and draining, another small: who needs the large one is in nobody's way.
#[tokio::test]
async fn who_waits_for_a_member_that_drains_holds_up_nobody_else() {
    let bench = Bench::start(config(), &[TWO_PAIRS[0], TWO_PAIRS[2], TWO_PAIRS[3]]).await;
    let mut members = bench.members.clone();
    members[1].max_context = 100;
    members[2].draining = true;
    bench.view(&members);
    let mut long = request(PROMPT, 200);
    long.queue_timeout_ms = 3000;
    let waiting = bench.ask(long).await.unwrap();
    let short = timeout(Duration::from_millis(2500), bench.answer(PROMPT, OUTPUT)).await;
    short.expect("it fits on a member that is idle").is_whole(PROMPT, OUTPUT);
    let late = collect(waiting).await;
    assert_eq!(late.code(), ErrorCode::NoMembers);
    assert!(late.error.unwrap().message.contains("could hold its 210 tokens"));
    bench.quiet().await;
}

#[tokio::test]
async fn who_failed_on_the_only_worker_a_moment_ago_holds_up_nobody_else() {
    let mut patient = config();
    patient.members.retry_ms = 5000;
    let bench = Bench::start(patient, &PAIR).await;
    bench.script(&[D::Refuse(ErrorCode::Internal)], &[]);
    let failed = tokio::spawn(collect(bench.ask(request(PROMPT, OUTPUT)).await.unwrap()));
    while decodes(&bench).is_empty() {
        sleep(Duration::from_millis(5)).await;
    }
    let other = timeout(Duration::from_millis(4500), bench.answer(PROMPT + 1, OUTPUT)).await;
    other.expect("the worker is free").is_whole(PROMPT + 1, OUTPUT);
    failed.await.unwrap().is_whole(PROMPT, OUTPUT);
    bench.quiet().await;
}

#[tokio::test]
async fn a_client_that_leaves_its_last_event_unread_keeps_nobody_from_running() {
    let mut narrow = config();
    narrow.running = 1;
    let bench = Bench::start(narrow, &PAIR).await;
    let unread = bench.ask(request(PROMPT, 31)).await.unwrap();
    let answer = timeout(Duration::from_secs(5), bench.answer(PROMPT, OUTPUT)).await;
    answer.expect("nothing runs").is_whole(PROMPT, OUTPUT);
    assert!(bench.shared.lives(), "a router that stops waits for it");
    drop(unread);
    bench.quiet().await;
}

#[tokio::test]
async fn what_never_fits_is_refused_at_once() {
    let bench = Bench::start(config(), &PAIR).await;
    let start = Instant::now();
    assert_eq!(bench.answer(300, 101).await.code(), ErrorCode::ContextLength);
    let mut unknown = request(PROMPT, OUTPUT);
    unknown.model = "other".into();
    assert_eq!(collect(bench.ask(unknown).await.unwrap()).await.code(), ErrorCode::ModelNotFound);
    let mut members = bench.members.clone();
    members[1].layout_fingerprint = 1;
    bench.view(&members);
    assert_eq!(bench.answer(PROMPT, OUTPUT).await.code(), ErrorCode::Mismatch);
    assert!(start.elapsed() < Duration::from_secs(5), "they do not wait in the queue");
    let mut empty = request(0, OUTPUT);
    empty.sequence.as_mut().unwrap().tokens.clear();
    assert!(bench.ask(empty).await.is_err());
}

#[tokio::test]
async fn many_at_once_through_failures_of_every_kind() {
    let bench = Bench::start(config(), &TWO_PAIRS).await;
    let d = [
        D::Die(1),
        D::Preempt(2),
        D::Refuse(ErrorCode::NoCapacity),
        D::Silent(4),
        D::Well,
        D::Fail(0, ErrorCode::Internal),
    ];
    let p = [P::DieBeforeFirst, P::Well, P::DieAfterFirst, P::Well, P::DieUnheard, P::Well, P::DieDelivered];
    bench.script(&d.repeat(2), &p.repeat(2));
    let answers = (0..24).map(|n| bench.answer(PROMPT + n % 5, OUTPUT + n));
    for (n, answer) in (0..).zip(futures::future::join_all(answers).await) {
        answer.is_whole(PROMPT + n % 5, OUTPUT + n);
    }
    bench.quiet().await;
}
