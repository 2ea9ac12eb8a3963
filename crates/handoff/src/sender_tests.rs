//! The sender: its table, and that it keeps window and release under any order of events.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const BOUNDS: Bounds = Bounds { window: 2, tries: 2, silence: Duration::from_secs(10) };

fn sender(blocks: u32, skip: &[u32]) -> Sender {
    Sender::new(blocks, |index| skip.contains(&index), BOUNDS, Now::ZERO)
}

fn say(sender: &mut Sender, events: &[Event]) -> Vec<Action> {
    events.iter().flat_map(|event| sender.on(event.clone(), Now::ZERO)).collect()
}

fn computed(indices: std::ops::Range<u32>) -> Vec<Event> {
    indices.map(|index| Event::Computed { index }).collect()
}

#[test]
fn offers_flow_while_prefill_computes_and_the_window_holds() {
    let mut it = sender(3, &[]);
    assert_eq!(say(&mut it, &computed(0..3)), [Action::Read { index: 0 }, Action::Read { index: 1 }]);
    assert_eq!(say(&mut it, &[Event::Fetched { index: 0 }]), [Action::Offer { index: 0 }]);
    let next = say(&mut it, &[Event::Accepted { index: 0 }]);
    assert_eq!(next, [Action::Release { index: 0 }, Action::Read { index: 2 }]);
}

#[test]
fn commits_after_the_last_offer_and_completes_on_the_answer() {
    let mut it = sender(2, &[0]);
    assert_eq!(say(&mut it, &computed(0..2)), [Action::Release { index: 0 }, Action::Read { index: 1 }]);
    assert_eq!(say(&mut it, &[Event::FirstToken { finished: false }]), []);
    assert_eq!(say(&mut it, &[Event::Fetched { index: 1 }]), [Action::Offer { index: 1 }, Action::Commit]);
    assert_eq!(
        say(&mut it, &[Event::Accepted { index: 1 }, Event::Committed]),
        [Action::Release { index: 1 }, Action::Complete]
    );
}

#[test]
fn a_refused_block_is_read_again_and_only_so_often() {
    let mut it = sender(1, &[]);
    say(&mut it, &[Event::FirstToken { finished: false }]);
    say(&mut it, &computed(0..1));
    say(&mut it, &[Event::Fetched { index: 0 }]);
    assert_eq!(say(&mut it, &[Event::Refused { index: 0 }]), [Action::Read { index: 0 }]);
    assert_eq!(
        say(&mut it, &[Event::Fetched { index: 0 }]),
        [Action::Offer { index: 0 }],
        "one commit is enough"
    );
    assert_eq!(say(&mut it, &[Event::Refused { index: 0 }]), [Action::Fail(Failure::Refused { index: 0 })]);
}

#[test]
fn a_token_that_ends_the_sequence_commits_at_once() {
    let mut it = sender(5, &[]);
    say(&mut it, &computed(0..1));
    assert_eq!(say(&mut it, &[Event::FirstToken { finished: true }]), [Action::Commit]);
    assert_eq!(say(&mut it, &[Event::Committed]), [Action::Complete]);
}

#[test]
fn a_confirmation_too_early_is_a_broken_protocol() {
    let mut it = sender(1, &[]);
    say(&mut it, &computed(0..1));
    say(&mut it, &[Event::Fetched { index: 0 }, Event::FirstToken { finished: false }]);
    assert_eq!(say(&mut it, &[Event::Committed]), [Action::Fail(Failure::Protocol)]);
}

#[test]
fn silence_fails_and_heartbeats_renew() {
    let mut it = sender(1, &[]);
    it.on(Event::Heartbeat, Now::from_secs(5));
    assert_eq!(it.on(Event::Tick, Now::from_secs(14)), []);
    assert_eq!(it.on(Event::Tick, Now::from_secs(15)), [Action::Fail(Failure::Silent)]);
    assert_eq!(it.on(Event::Committed, Now::from_secs(15)), []);
}

fn any_event() -> impl Strategy<Value = Event> {
    let index = 0..5u32;
    prop_oneof![
        4 => index.clone().prop_map(|index| Event::Computed { index }),
        4 => index.clone().prop_map(|index| Event::Fetched { index }),
        4 => index.clone().prop_map(|index| Event::Accepted { index }),
        1 => index.prop_map(|index| Event::Refused { index }),
        1 => any::<bool>().prop_map(|finished| Event::FirstToken { finished }),
        1 => Just(Event::Committed),
        1 => Just(Event::Heartbeat),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_order_keeps_the_window_and_releases_once(events in prop::collection::vec(any_event(), 0..80)) {
        let mut it = sender(4, &[1]);
        let (mut offered, mut accepted, mut released) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut commits, mut finished) = (0, None);
        for event in events {
            if let Event::Accepted { index } = event
                && offered.contains(&index) { accepted.insert(index); }
            if let Event::FirstToken { finished: value } = event && it.state() == State::Sending {
                finished.get_or_insert(value);
            }
            for action in it.on(event, Now::ZERO) {
                match action {
                    Action::Offer { index } => { offered.insert(index); }
                    Action::Release { index } => {
                        prop_assert!(index == 1 || accepted.contains(&index), "released before accepted");
                        prop_assert!(released.insert(index), "released twice");
                    }
                    Action::Commit => {
                        commits += 1;
                        prop_assert!(finished.is_some());
                    }
                    Action::Complete => {
                        prop_assert_eq!(commits, 1);
                        prop_assert!(finished == Some(true) || [0, 2, 3].iter().all(|index| accepted.contains(index)));
                    }
                    Action::Read { .. } | Action::Fail(_) => {}
                }
            }
            prop_assert!(it.under_way() <= BOUNDS.window as usize);
        }
    }
}
