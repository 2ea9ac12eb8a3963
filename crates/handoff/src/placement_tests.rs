//! The router's view: its table, and that no order of events gives the first token twice or leaves a side held.

use super::*;
use proptest::prelude::*;

fn say(placement: &mut Placement, events: &[Event]) -> Vec<Action> {
    events.iter().flat_map(|event| placement.on(event.clone())).collect()
}

const RESERVED: Event = Event::Reserved { reservation: 7, epoch: 1, present: 2 };

fn ask(epoch: u32, accepted: &[u32], forced: Option<u32>) -> Action {
    Action::AskPrefill { reservation: 7, epoch, present: 2, accepted: accepted.to_vec(), forced }
}

#[test]
fn the_plain_road() {
    let mut it = Placement::new(2);
    let actions = say(
        &mut it,
        &[
            RESERVED,
            Event::FirstToken { epoch: 1, token: 5 },
            Event::Delivered { epoch: 1 },
            Event::Decoding { token: 5 },
            Event::Token,
            Event::Finished,
        ],
    );
    let first = Action::First { token: 5 };
    assert_eq!(
        actions,
        [ask(1, &[], None), first, Action::Forward, Action::DropPrefill, Action::End(End::Finished)]
    );
}

#[test]
fn a_lost_prefill_is_fenced_before_another_is_asked_and_the_seen_token_is_forced() {
    let mut it = Placement::new(2);
    say(&mut it, &[RESERVED, Event::FirstToken { epoch: 1, token: 5 }]);
    let lost = it.on(Event::PrefillLost { epoch: 1 });
    assert_eq!(lost, [Action::DropPrefill, Action::Advance { reservation: 7, epoch: 1 }]);
    assert_eq!(it.on(Event::Delivered { epoch: 1 }), [], "given up");
    assert_eq!(it.on(Event::Advanced { epoch: 2, accepted: vec![0, 1, 3] }), [ask(2, &[0, 1, 3], Some(5))]);
    assert_eq!(it.on(Event::FirstToken { epoch: 2, token: 5 }), [], "the client has it");
    let lost = it.on(Event::PrefillLost { epoch: 2 });
    assert_eq!(
        lost,
        [Action::DropPrefill, Action::DropDecode, Action::End(End::PrefillLost)],
        "no tries left"
    );
}

#[test]
fn a_prefill_that_died_after_its_commit_cost_nothing() {
    let mut it = Placement::new(2);
    say(&mut it, &[RESERVED, Event::PrefillLost { epoch: 1 }]);
    assert_eq!(it.on(Event::AlreadyComplete), []);
    assert_eq!(it.on(Event::Decoding { token: 9 }), [Action::First { token: 9 }]);
}

#[test]
fn a_worker_of_role_both_needs_no_prefill() {
    let mut it = Placement::new(1);
    let actions = say(&mut it, &[Event::LocalPrefill, Event::Token, Event::Finished]);
    assert_eq!(actions, [Action::Forward, Action::End(End::Finished)]);
}

#[test]
fn nonsense_ends_the_attempt() {
    let mut it = Placement::new(1);
    assert_eq!(it.on(Event::Token), [Action::DropDecode, Action::End(End::Protocol)]);
}

fn any_event() -> impl Strategy<Value = Event> {
    let epoch = 1..4u32;
    prop_oneof![
        4 => Just(RESERVED),
        1 => Just(Event::LocalPrefill),
        3 => (epoch.clone(), 0..9u32).prop_map(|(epoch, token)| Event::FirstToken { epoch, token }),
        1 => epoch.clone().prop_map(|epoch| Event::Delivered { epoch }),
        3 => epoch.clone().prop_map(|epoch| Event::PrefillLost { epoch }),
        3 => epoch.prop_map(|epoch| Event::Advanced { epoch, accepted: vec![0] }),
        1 => Just(Event::AlreadyComplete),
        2 => (0..9u32).prop_map(|token| Event::Decoding { token }),
        1 => Just(Event::Token),
        1 => Just(Event::Preempted),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_order_gives_one_first_token_and_lets_go(events in prop::collection::vec(any_event(), 0..40)) {
        let mut it = Placement::new(3);
        let (mut firsts, mut prefills, mut fenced, mut ends) = (0, 0i32, true, 0);
        let mut last = Vec::new();
        for event in events.into_iter().chain([Event::DecodeLost]) {
            let advanced = matches!(event, Event::Advanced { .. });
            last = it.on(event);
            for action in &last {
                match action {
                    Action::First { .. } => firsts += 1,
                    Action::AskPrefill { .. } => {
                        prop_assert!(fenced || advanced, "a second prefill before the first was fenced");
                        (prefills, fenced) = (prefills + 1, false);
                    }
                    Action::DropPrefill => prefills -= 1,
                    Action::End(_) => ends += 1,
                    _ => {}
                }
            }
            prop_assert!((0..=1).contains(&prefills));
        }
        prop_assert!(firsts <= 1);
        prop_assert_eq!((prefills, ends, it.state()), (0, 1, State::Ended), "{:?}", last);
    }
}
