//! Placement by hand-made views, and by random ones against the definition.

use super::*;
use proptest::prelude::*;
use proto::Load;

const CREDITS: Credits = Credits { tokens: 1000, requests: 4 };

fn member(id: &str, role: Role) -> Member {
    Member {
        id: id.into(),
        role: role as i32,
        model: "demo".into(),
        block_tokens: 64,
        max_context: 4096,
        max_sequences: 8,
        version: "1".into(),
        load: Some(Load { blocks_total: 100, blocks_free: 100, ..Load::default() }),
        ..Member::default()
    }
}

fn idle(member: &Member) -> Candidate<'_> {
    Candidate {
        member,
        excluded: false,
        held: false,
        full: false,
        blocks_free: 100,
        sequences_used: 0,
        owed_tokens: 0,
        owed_requests: 0,
        cached_tokens: 0,
        turn: 0,
    }
}

fn wanted(tokens: u32) -> Wanted {
    Wanted { tokens, total: tokens + 100, ..Wanted::default() }
}

fn placed(decision: Decision) -> (String, String) {
    match decision {
        Decision::Place { prefill, decode, .. } => (prefill, decode),
        other => panic!("not placed: {other:?}"),
    }
}

fn ids(prefill: &str, decode: &str) -> (String, String) {
    (prefill.into(), decode.into())
}

#[test]
fn decode_room_decides_before_a_cached_prefix() {
    let [p, d1, d2] = [member("p", Role::Prefill), member("d1", Role::Decode), member("d2", Role::Decode)];
    let crowded = Candidate { blocks_free: 1, cached_tokens: 512, ..idle(&d1) };
    let decision = place(&wanted(640), &[idle(&p), crowded.clone(), idle(&d2)], CREDITS);
    assert_eq!(placed(decision), ids("p", "d2"));
    assert_eq!(
        place(&wanted(640), &[idle(&p), crowded], CREDITS),
        Decision::Wait(Lack::DecodeRoom(vec!["d1".into()]))
    );
}

#[test]
fn a_cached_prefix_attracts_until_the_backlog_outweighs_it() {
    let [p1, p2, d] = [member("p1", Role::Prefill), member("p2", Role::Prefill), member("d", Role::Decode)];
    let warm = |owed| Candidate { cached_tokens: 384, owed_tokens: owed, owed_requests: 1, ..idle(&p1) };
    let choose = |owed| placed(place(&wanted(448), &[warm(owed), idle(&p2), idle(&d)], CREDITS));
    assert_eq!(choose(100), ids("p1", "d"));
    assert_eq!(choose(400), ids("p2", "d"));
}

#[test]
fn equals_take_turns() {
    let [p1, p2, d] = [member("p1", Role::Prefill), member("p2", Role::Prefill), member("d", Role::Decode)];
    let last = Candidate { turn: 7, ..idle(&p1) };
    assert_eq!(placed(place(&wanted(10), &[last, idle(&p2), idle(&d)], CREDITS)), ids("p2", "d"));
}

#[test]
fn credits_bound_what_a_prefill_member_owes() {
    let [p, d] = [member("p", Role::Prefill), member("d", Role::Decode)];
    let owing = |tokens, requests| Candidate { owed_tokens: tokens, owed_requests: requests, ..idle(&p) };
    let wait = Decision::Wait(Lack::PrefillCredit(vec!["p".into()]));
    assert_eq!(place(&wanted(600), &[owing(500, 1), idle(&d)], CREDITS), wait);
    assert_eq!(place(&wanted(1), &[owing(4, 4), idle(&d)], CREDITS), wait);
    placed(place(&wanted(3000), &[owing(0, 0), idle(&d)], CREDITS));
}

#[test]
fn only_matching_members_are_paired_and_the_reason_is_named() {
    let p = member("p", Role::Prefill);
    let odd = |change: fn(&mut Member)| {
        let mut decode = member("d", Role::Decode);
        change(&mut decode);
        match place(&wanted(10), &[idle(&p), idle(&decode)], CREDITS) {
            Decision::Mismatch(reason) => reason,
            other => panic!("{other:?}"),
        }
    };
    assert!(odd(|d| d.layout_fingerprint = 9).contains("KV layout"));
    assert!(odd(|d| d.weights_fingerprint = 9).contains("weights"));
    assert!(odd(|d| d.version = "2".into()).contains("version"));
    assert!(odd(|d| d.model = "other".into()).contains("model"));
    let mut d2 = member("d2", Role::Decode);
    d2.layout_fingerprint = 9;
    let d = member("d", Role::Decode);
    let suspected = Candidate { excluded: true, ..idle(&d) };
    let decision = place(&wanted(10), &[idle(&p), idle(&d2), suspected], CREDITS);
    assert_eq!(decision, Decision::NoMembers(Role::Decode), "the matching one may be back in a moment");
}

#[test]
fn what_can_never_fit_and_what_is_missing_is_said() {
    let [p, mut d] = [member("p", Role::Prefill), member("d", Role::Decode)];
    assert_eq!(place(&wanted(1), &[], CREDITS), Decision::NoMembers(Role::Prefill));
    assert_eq!(place(&wanted(1), &[idle(&p)], CREDITS), Decision::NoMembers(Role::Decode));
    let other = Wanted { model: "other".into(), ..wanted(1) };
    assert_eq!(place(&other, &[idle(&p), idle(&d)], CREDITS), Decision::ModelNotFound);
    let long = Decision::TooLong { tokens: 4097, limit: 4096 };
    assert_eq!(place(&wanted(3997), &[idle(&p), idle(&d)], CREDITS), long);
    d.load = Some(Load { blocks_total: 10, blocks_free: 10, ..Load::default() });
    let small = Decision::TooLong { tokens: 641, limit: 640 };
    assert_eq!(place(&wanted(541), &[idle(&p), idle(&d)], CREDITS), small);
}

#[test]
fn a_prompt_goes_only_where_its_first_token_has_room() {
    let [mut small, large, d] =
        [member("small", Role::Prefill), member("large", Role::Prefill), member("d", Role::Decode)];
    small.load = Some(Load { blocks_total: 10, blocks_free: 10, ..Load::default() });
    let busy = Candidate { owed_requests: 1, owed_tokens: 1, ..idle(&large) };
    let choose = |wanted: &Wanted| placed(place(wanted, &[idle(&small), busy.clone(), idle(&d)], CREDITS)).0;
    assert_eq!(choose(&wanted(638)), "small");
    assert_eq!(choose(&wanted(639)), "large", "it would take the end of its pool for the end of the answer");
    assert_eq!(choose(&wanted(640)), "large", "it would refuse");
    assert_eq!(choose(&Wanted { total: 640, ..wanted(639) }), "small", "the first token is the last");
    let alone = [idle(&small), idle(&d)];
    assert_eq!(place(&wanted(639), &alone, CREDITS), Decision::TooLong { tokens: 739, limit: 640 });
}

/// A member whose pool holds so many tokens.
fn sized(id: &str, role: Role, tokens: u32) -> Member {
    let load = Load { blocks_total: tokens / 64, blocks_free: tokens / 64, ..Load::default() };
    Member { load: Some(load), ..member(id, role) }
}

#[test]
fn what_no_couple_can_hold_never_fits() {
    let [p, d, b] =
        [sized("p", Role::Prefill, 640), sized("d", Role::Decode, 4096), sized("b", Role::Both, 1280)];
    let decision = |wanted| place(&wanted, &[idle(&p), idle(&d), idle(&b)], CREDITS);
    let long = Wanted { total: 3000, ..wanted(1300) };
    assert_eq!(
        decision(long),
        Decision::TooLong { tokens: 3000, limit: 1280 },
        "p cannot read it, b not hold it"
    );
    assert_eq!(placed(decision(Wanted { total: 3000, ..wanted(600) })), ids("p", "d"));
    assert_eq!(placed(decision(wanted(1000))), ids("b", "b"));
}

#[test]
fn who_only_fits_where_nobody_answers_waits_for_itself_alone() {
    let [p, small, large] =
        [member("p", Role::Prefill), sized("small", Role::Decode, 640), member("large", Role::Decode)];
    let draining = Candidate { excluded: true, ..idle(&large) };
    let decision = |tokens| place(&wanted(tokens), &[idle(&p), idle(&small), draining.clone()], CREDITS);
    assert_eq!(decision(600), Decision::Wait(Lack::Absent));
    assert_eq!(placed(decision(100)), ids("p", "small"));
    assert_eq!(
        place(&wanted(600), &[idle(&p), draining.clone()], CREDITS),
        Decision::NoMembers(Role::Decode)
    );
}

#[test]
fn nobody_waits_for_blocks_in_quarantine() {
    let [p, small, mut large] =
        [member("p", Role::Prefill), sized("small", Role::Decode, 640), member("large", Role::Decode)];
    large.load = Some(Load { blocks_free: 0, blocks_quarantined: 60, ..large.load.unwrap() });
    let full = Candidate { blocks_free: 0, ..idle(&large) };
    let decision = |tokens| place(&wanted(tokens), &[idle(&p), idle(&small), full.clone()], CREDITS);
    assert_eq!(decision(64 * 50), Decision::Wait(Lack::Absent));
    assert_eq!(decision(64 * 39), Decision::Wait(Lack::DecodeRoom(vec!["large".into()])));
}

#[test]
fn a_member_that_is_held_is_for_those_who_come_first() {
    let [p, d1, d2] = [member("p", Role::Prefill), member("d1", Role::Decode), member("d2", Role::Decode)];
    let held = Candidate { held: true, ..idle(&d1) };
    let decision = |wanted| place(&wanted, &[idle(&p), held.clone(), idle(&d2)], CREDITS);
    assert_eq!(placed(decision(wanted(10))), ids("p", "d2"));
    assert_eq!(place(&wanted(10), &[idle(&p), held.clone()], CREDITS), Decision::Wait(Lack::Turn));
    let pinned = Wanted { pinned: Some("d1".into()), ..wanted(10) };
    assert_eq!(placed(decision(pinned)), ids("p", "d1"), "it has its place there");
}

#[test]
fn pairs_are_preferred_to_both_unless_both_has_much_more_room() {
    let [p, d, b] = [member("p", Role::Prefill), member("d", Role::Decode), member("b", Role::Both)];
    let choose = |used| {
        let decode = Candidate { sequences_used: used, ..idle(&d) };
        placed(place(&wanted(10), &[idle(&p), decode, idle(&b)], CREDITS))
    };
    assert_eq!(choose(1), ids("p", "d"));
    assert_eq!(choose(6), ids("b", "b"));
    let failed = Wanted { avoid: vec!["p".into()], ..wanted(10) };
    assert_eq!(placed(place(&failed, &[idle(&p), idle(&d), idle(&b)], CREDITS)), ids("b", "b"));
    assert_eq!(placed(place(&failed, &[idle(&p), idle(&d)], CREDITS)), ids("p", "d"), "better than nothing");
}

#[test]
fn a_reservation_stays_where_it_is() {
    let [p, d1, d2] = [member("p", Role::Prefill), member("d1", Role::Decode), member("d2", Role::Decode)];
    let pinned = Wanted { pinned: Some("d1".into()), ..wanted(100) };
    let gone = Candidate { excluded: true, full: true, blocks_free: 0, ..idle(&d1) };
    assert_eq!(placed(place(&pinned, &[idle(&p), gone.clone(), idle(&d2)], CREDITS)), ids("p", "d1"));
    let nobody = Decision::NoMembers(Role::Prefill);
    assert_eq!(place(&pinned, &[gone.clone(), idle(&d2)], CREDITS), nobody);
    let small = sized("small", Role::Prefill, 64);
    assert_eq!(place(&pinned, &[idle(&small), gone.clone()], CREDITS), nobody, "who is too small is no help");
    let away = Candidate { excluded: true, ..idle(&p) };
    assert_eq!(place(&pinned, &[idle(&small), away, gone], CREDITS), nobody, "nor does it wait for who went");
}

#[test]
fn ready_means_that_a_request_would_succeed() {
    let [p, d, b] = [member("p", Role::Prefill), member("d", Role::Decode), member("b", Role::Both)];
    assert_eq!(readiness(&[idle(&p), idle(&d)]), Ok(()));
    assert_eq!(readiness(&[idle(&b)]), Ok(()));
    assert!(readiness(&[idle(&p)]).unwrap_err().contains("decode"));
    assert!(readiness(&[idle(&d)]).unwrap_err().contains("prefill"));
    assert!(readiness(&[]).unwrap_err().contains("joined"));
    let draining = Candidate { excluded: true, ..idle(&b) };
    assert!(readiness(&[draining]).is_err());
}

fn any_cluster() -> impl Strategy<Value = Vec<(Member, [u32; 5], bool, bool)>> {
    let one = (1..4i32, 0..2u64, any::<[u8; 5]>(), any::<bool>(), any::<bool>());
    prop::collection::vec(one, 0..8).prop_map(|ones| {
        let build = |(index, (role, layout, n, excluded, full)): (usize, (i32, u64, [u8; 5], bool, bool))| {
            let role = Role::try_from(role).unwrap();
            let member = Member { layout_fingerprint: layout, ..member(&index.to_string(), role) };
            (member, n.map(u32::from), excluded, full)
        };
        ones.into_iter().enumerate().map(build).collect()
    })
}

proptest! {
    /// Whatever the cluster looks like, a placement has room, credit and matching members, and a request
    /// that could be placed is not told to wait.
    #[test]
    fn placements_are_sound_and_complete(cluster in any_cluster(), tokens in 1..2000u32) {
        let candidates: Vec<_> = cluster.iter().map(|(member, n, excluded, full)| Candidate {
            excluded: *excluded, full: *full, blocks_free: n[0] % 101, sequences_used: n[1] % 9,
            owed_tokens: u64::from(n[2]) * 5, owed_requests: n[3] % 5, cached_tokens: n[4], ..idle(member)
        }).collect();
        let wanted = wanted(tokens);
        let view = View { wanted: &wanted, credits: CREDITS, members: candidates.iter().collect() };
        let sound = |p: &Candidate, d: &Candidate| {
            let roles = match (p.member.role(), d.member.role()) {
                (Role::Prefill, Role::Decode) => true,
                (Role::Both, Role::Both) => p.member.id == d.member.id,
                _ => false,
            };
            roles && !p.excluded && !d.excluded && view.has_room(d) && view.has_credit(p)
                && mismatch(p.member, d.member).is_none()
        };
        let possible = candidates.iter().any(|p| candidates.iter().any(|d| sound(p, d)));
        match place(&wanted, &candidates, CREDITS) {
            Decision::Place { prefill, decode, .. } => {
                let find = |id: &str| candidates.iter().find(|c| c.member.id == id).unwrap();
                prop_assert!(sound(find(&prefill), find(&decode)));
            }
            other => prop_assert!(!possible, "{other:?}"),
        }
    }
}
