//! The receiver: its table, and that no order of events breaks its promises.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const PATIENCE: Patience = Patience {
    silence: Duration::from_secs(10),
    delivery: Duration::from_secs(30),
    landing: Duration::from_secs(20),
};

fn receiver(blocks: u32, present: u32) -> Receiver {
    Receiver::new(blocks, present, PATIENCE, Now::ZERO)
}

fn seconds(seconds: u64) -> Now {
    Now::from_secs(seconds)
}

fn say(receiver: &mut Receiver, events: &[Event]) -> Vec<Action> {
    events.iter().flat_map(|event| receiver.on(event.clone(), Now::ZERO)).collect()
}

fn reply(epoch: u32, reply: Reply) -> Action {
    Action::Reply { epoch, reply }
}

#[test]
fn completes_when_commit_and_every_block_are_here_in_any_order() {
    let mut it = receiver(3, 1);
    let actions = say(
        &mut it,
        &[
            Event::Open { epoch: 1 },
            Event::Commit { epoch: 1, finished: false },
            Event::Offer { epoch: 1, index: 2 },
            Event::Offer { epoch: 1, index: 1 },
            Event::Written { index: 2 },
        ],
    );
    let accept = reply(1, Reply::Accept { index: 2 });
    assert_eq!(actions, [Action::Write { index: 2 }, Action::Write { index: 1 }, accept]);
    let last = it.on(Event::Written { index: 1 }, Now::ZERO);
    assert_eq!(last, [reply(1, Reply::Accept { index: 1 }), reply(1, Reply::Committed), Action::Activate]);
    assert_eq!(it.on(Event::Advance { epoch: 1 }, Now::ZERO), [Action::Tell(Answer::AlreadyComplete)]);
}

#[test]
fn everything_present_needs_only_the_commit() {
    let mut it = receiver(2, 2);
    let actions = it.on(Event::Commit { epoch: 1, finished: false }, Now::ZERO);
    assert_eq!(actions, [reply(1, Reply::Committed), Action::Activate]);
}

#[test]
fn duplicates_are_answered_and_never_written_again() {
    let mut it = receiver(1, 0);
    let offer = Event::Offer { epoch: 1, index: 0 };
    assert_eq!(say(&mut it, &[offer.clone(), offer.clone()]), [Action::Write { index: 0 }]);
    let accept = reply(1, Reply::Accept { index: 0 });
    assert_eq!(say(&mut it, &[Event::Written { index: 0 }, offer]), [accept.clone(), accept]);
}

#[test]
fn spoiled_bytes_are_refused_and_may_come_again() {
    let mut it = receiver(1, 0);
    let offer = Event::Offer { epoch: 1, index: 0 };
    let actions = say(&mut it, &[offer.clone(), Event::Spoiled { index: 0 }, offer]);
    assert_eq!(
        actions,
        [Action::Write { index: 0 }, reply(1, Reply::Refuse { index: 0 }), Action::Write { index: 0 }]
    );
}

#[test]
fn advancing_fences_the_old_epoch_keeps_blocks_and_forgets_the_commit() {
    let mut it = receiver(2, 0);
    say(&mut it, &[Event::Offer { epoch: 1, index: 0 }, Event::Written { index: 0 }]);
    say(&mut it, &[Event::Commit { epoch: 1, finished: false }]);
    let advanced = Action::Tell(Answer::Advanced { epoch: 2, accepted: vec![0] });
    let actions = it.on(Event::Advance { epoch: 1 }, Now::ZERO);
    assert_eq!(actions, [reply(1, Reply::Stale { current: 2 }), advanced.clone()]);
    assert_eq!(it.on(Event::Advance { epoch: 1 }, Now::ZERO), [advanced], "asked twice, answered alike");
    let stale = it.on(Event::Offer { epoch: 1, index: 1 }, Now::ZERO);
    assert_eq!(stale, [reply(1, Reply::Stale { current: 2 })]);
    let actions = say(&mut it, &[Event::Offer { epoch: 2, index: 1 }, Event::Written { index: 1 }]);
    assert!(!actions.contains(&Action::Activate), "the commit of epoch 1 does not count");
    assert!(say(&mut it, &[Event::Commit { epoch: 2, finished: false }]).contains(&Action::Activate));
}

#[test]
fn a_write_of_the_old_epoch_serves_the_new_one() {
    let mut it = receiver(1, 0);
    say(&mut it, &[Event::Offer { epoch: 1, index: 0 }, Event::Advance { epoch: 1 }]);
    let actions = say(&mut it, &[Event::Offer { epoch: 2, index: 0 }, Event::Written { index: 0 }]);
    assert_eq!(actions, [reply(2, Reply::Accept { index: 0 })]);
}

#[test]
fn a_first_token_that_ends_the_sequence_frees_once_writes_have_landed() {
    let mut it = receiver(2, 0);
    say(&mut it, &[Event::Offer { epoch: 1, index: 0 }]);
    let actions = it.on(Event::Commit { epoch: 1, finished: true }, Now::ZERO);
    assert_eq!(actions, [reply(1, Reply::Committed), Action::Finish, Action::Quarantine]);
    assert_eq!((it.state(), it.writing()), (State::Quarantined, vec![0]));
    assert_eq!(it.on(Event::Written { index: 0 }, Now::ZERO), [Action::Free]);
    assert_eq!(it.on(Event::Cancel, Now::ZERO), []);
}

#[test]
fn silence_loses_the_stream_and_then_the_reservation() {
    let mut it = receiver(1, 0);
    it.on(Event::Open { epoch: 1 }, seconds(1));
    it.on(Event::Heartbeat { epoch: 1 }, seconds(9));
    assert_eq!(it.deadline(), Some(seconds(19)));
    assert_eq!(it.on(Event::Tick, seconds(18)), []);
    assert_eq!(it.on(Event::Tick, seconds(19)), [reply(1, Reply::Silent)]);
    assert_eq!(it.deadline(), Some(seconds(49)), "the router has time to advance");
    assert_eq!(it.on(Event::Tick, seconds(49)), [Action::Expire, Action::Free]);
}

#[test]
fn a_lost_stream_waits_for_the_router() {
    let mut it = receiver(1, 0);
    it.on(Event::Open { epoch: 1 }, seconds(1));
    it.on(Event::Lost { epoch: 1 }, seconds(5));
    assert_eq!(it.on(Event::Tick, seconds(34)), []);
    assert!(matches!(it.on(Event::Advance { epoch: 1 }, seconds(34))[..], [Action::Tell(_)]));
    assert_eq!(it.deadline(), Some(seconds(64)));
}

#[test]
fn an_overdue_write_is_severed_once_and_ends_its_reservation() {
    let mut it = receiver(1, 0);
    it.on(Event::Offer { epoch: 1, index: 0 }, seconds(0));
    it.on(Event::Heartbeat { epoch: 1 }, seconds(15));
    assert_eq!(it.deadline(), Some(seconds(20)));
    let ended = [Action::Sever { index: 0 }, reply(1, Reply::Cancelled), Action::Quarantine];
    assert_eq!(it.on(Event::Tick, seconds(20)), ended, "however alive its stream");
    assert_eq!((it.deadline(), it.writing()), (None, vec![0]));
    assert_eq!(it.on(Event::Offer { epoch: 1, index: 0 }, seconds(22)), [reply(1, Reply::Cancelled)]);
    assert_eq!(it.on(Event::Tick, seconds(9999)), []);
    assert_eq!(it.on(Event::Spoiled { index: 0 }, seconds(9999)), [Action::Free]);
}

#[test]
fn a_write_whose_end_nobody_knows_ends_the_reservation_and_keeps_its_block() {
    let mut it = receiver(2, 0);
    say(&mut it, &[Event::Offer { epoch: 1, index: 0 }, Event::Offer { epoch: 1, index: 1 }]);
    let actions = it.on(Event::Astray { index: 1 }, seconds(1));
    assert_eq!(actions, [reply(1, Reply::Cancelled), Action::Quarantine]);
    assert_eq!(it.on(Event::Written { index: 0 }, seconds(2)), []);
    assert_eq!((it.state(), it.writing(), it.deadline()), (State::Quarantined, vec![1], None));
    assert_eq!(it.on(Event::Tick, seconds(9999)), [], "nothing is severed that nobody asks for any more");
}

#[test]
fn what_is_being_written_is_quarantined_until_it_has_landed() {
    let mut it = receiver(2, 0);
    it.on(Event::Offer { epoch: 1, index: 1 }, seconds(0));
    assert_eq!(it.on(Event::Cancel, seconds(1)), [reply(1, Reply::Cancelled), Action::Quarantine]);
    assert_eq!((it.state(), it.writing()), (State::Quarantined, vec![1]));
    assert_eq!(it.deadline(), Some(seconds(20)));
    assert_eq!(it.on(Event::Tick, seconds(20)), [Action::Sever { index: 1 }]);
    assert_eq!(it.deadline(), None, "whoever severs tells when");
    assert_eq!(it.on(Event::Spoiled { index: 1 }, seconds(20)), [Action::Free]);
    assert_eq!(it.state(), State::Closed);
}

#[derive(Default)]
struct Witness {
    writing: BTreeSet<u32>,
    astray: BTreeSet<u32>,
    accepted: BTreeSet<u32>,
    committed: Option<u32>,
    activated: usize,
    quarantined: usize,
    freed: usize,
}

impl Witness {
    fn saw(&mut self, event: &Event, epoch: u32) {
        match event {
            Event::Written { index } => {
                self.writing.remove(index);
                self.accepted.insert(*index);
            }
            Event::Spoiled { index } => {
                self.writing.remove(index);
            }
            Event::Astray { index } => {
                self.astray.insert(*index);
            }
            Event::Commit { epoch: of, finished: false } if *of == epoch => {
                self.committed = Some(epoch);
            }
            _ => {}
        }
    }

    fn may_end(&self, index: u32) -> bool {
        self.writing.contains(&index) && !self.astray.contains(&index)
    }

    fn judge(&mut self, actions: &[Action], epoch: u32, blocks: u32) {
        for action in actions {
            match action {
                Action::Write { index } => {
                    assert!(!self.accepted.contains(index), "wrote into an accepted block");
                    assert!(self.writing.insert(*index), "two writes into one block");
                    let ended = self.activated + self.quarantined + self.freed;
                    assert_eq!(ended, 0, "wrote into a block that is no longer ours");
                }
                Action::Activate => {
                    assert_eq!(self.accepted.len() as u32, blocks, "decoding with a block missing");
                    assert_eq!(self.committed, Some(epoch), "decoding without a commit of this epoch");
                    self.activated += 1;
                }
                Action::Quarantine => {
                    assert!(!self.writing.is_empty(), "quarantined without a write");
                    self.quarantined += 1;
                }
                Action::Sever { index } => assert!(self.writing.contains(index), "severed nothing"),
                Action::Free => {
                    assert!(self.writing.is_empty(), "freed under a write");
                    self.freed += 1;
                }
                _ => {}
            }
        }
        assert!(self.activated + self.freed <= 1, "let go twice");
        assert!(self.activated + self.quarantined <= 1, "quarantined twice");
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let epoch = 1..4u32;
    let index = 0..4u32;
    prop_oneof![
        1 => epoch.clone().prop_map(|epoch| Event::Open { epoch }),
        4 => (epoch.clone(), index.clone()).prop_map(|(epoch, index)| Event::Offer { epoch, index }),
        4 => index.clone().prop_map(|index| Event::Written { index }),
        1 => index.clone().prop_map(|index| Event::Spoiled { index }),
        1 => index.prop_map(|index| Event::Astray { index }),
        2 => (epoch.clone(), proptest::bool::weighted(0.1)).prop_map(|(epoch, finished)| Event::Commit { epoch, finished }),
        1 => epoch.clone().prop_map(|epoch| Event::Heartbeat { epoch }),
        1 => epoch.clone().prop_map(|epoch| Event::Lost { epoch }),
        1 => epoch.prop_map(|epoch| Event::Advance { epoch }),
        1 => Just(Event::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_order_of_events_breaks_a_promise(events in prop::collection::vec((any_event(), 0..4u64), 0..60), present in 0..3u32) {
        let (blocks, mut at) = (3, 0);
        let mut it = receiver(blocks, present);
        let mut witness = Witness { accepted: (0..present).collect(), ..Witness::default() };
        for (event, pause) in events {
            at += pause;
            // The driver reports a write only once, and only one that it was asked for.
            if matches!(event, Event::Written { index } | Event::Spoiled { index } | Event::Astray { index } if !witness.may_end(index)) {
                continue;
            }
            witness.saw(&event, it.epoch());
            let before = it.epoch();
            let actions = it.on(event, seconds(at));
            if it.epoch() != before {
                witness.committed = None;
            }
            witness.judge(&actions, it.epoch(), blocks);
        }
        let actions = it.on(Event::Cancel, seconds(at));
        witness.judge(&actions, it.epoch(), blocks);
        for index in witness.writing.difference(&witness.astray).copied().collect::<Vec<_>>() {
            witness.saw(&Event::Written { index }, it.epoch());
            let actions = it.on(Event::Written { index }, seconds(at));
            witness.judge(&actions, it.epoch(), blocks);
        }
        let kept = usize::from(!witness.astray.is_empty());
        prop_assert_eq!(witness.activated + witness.freed + kept, 1, "ended with something held");
    }
}
