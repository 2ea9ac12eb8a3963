//! The hand-off, model checked: the real machines of router, decode and prefill in every order of events that a bounded
//! number of faults allows. Promises must hold in every state, among them that a run can only come to rest with its answer
//! ended and nothing held; and machines made to break a rule must be found out. `BATON_PROOF=model` checks larger bounds.

mod broken;
mod decode;
mod model;
mod network;
mod prefill;
mod properties;
mod router;

use broken::Broken;
use model::{Action, Bounds, Faults, Protocol, State};
use properties::*;
use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};
use std::{collections::BTreeSet, num::NonZero, time::Instant};

const NONE: Faults = Faults { losses: 0, copies: 0, damages: 0, crashes: 0, hangs: 0 };
const EACH: Faults = Faults { losses: 1, copies: 1, damages: 1, crashes: 1, hangs: 1 };

/// Two epochs of one placement.
const EPOCHS: Bounds = Bounds { blocks: 1, window: 1, offers: 1, prefills: 2, placements: 1, faults: NONE };
/// Two placements of one epoch each.
const PLACEMENTS: Bounds = Bounds { prefills: 1, placements: 2, ..EPOCHS };
/// One delivery, with all that can happen to it.
const DELIVERY: Bounds = Bounds { prefills: 1, offers: 2, ..EPOCHS };

const USUAL: [(&str, Bounds); 6] = [
    ("two epochs, a message lost", Bounds { faults: Faults { losses: 1, ..NONE }, ..EPOCHS }),
    ("two epochs, a message copied", Bounds { faults: Faults { copies: 1, ..NONE }, ..EPOCHS }),
    ("two epochs, a worker crashed", Bounds { faults: Faults { crashes: 1, ..NONE }, ..EPOCHS }),
    ("two placements", PLACEMENTS),
    ("one delivery, one fault of each kind", Bounds { faults: EACH, ..DELIVERY }),
    (
        "one delivery of two blocks, bytes damaged",
        Bounds { blocks: 2, window: 2, faults: Faults { damages: 1, hangs: 1, ..NONE }, ..DELIVERY },
    ),
];

/// From the smallest to the largest.
const LARGER: [(&str, Bounds); 6] = [
    ("two epochs, bytes damaged", Bounds { offers: 2, faults: Faults { damages: 1, ..NONE }, ..EPOCHS }),
    ("two epochs, a write that hangs", Bounds { faults: Faults { hangs: 1, ..NONE }, ..EPOCHS }),
    ("two placements, a worker crashed", Bounds { faults: Faults { crashes: 1, ..NONE }, ..PLACEMENTS }),
    ("two epochs of two blocks", Bounds { blocks: 2, ..EPOCHS }),
    (
        "two epochs, a message lost and one copied",
        Bounds { faults: Faults { losses: 1, copies: 1, ..NONE }, ..EPOCHS },
    ),
    ("two placements of two epochs", Bounds { prefills: 2, ..PLACEMENTS }),
];

/// Explores all of it; what was reached of what must be reached somewhere.
fn explore(name: &str, bounds: Bounds) -> BTreeSet<&'static str> {
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let checker = Protocol { bounds, broken: None }.checker().threads(threads).spawn_dfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{name}: {states} states, {depth} deep, {:.1} s", began.elapsed().as_secs_f32());
    let mut reached = BTreeSet::new();
    for property in checker.model().properties() {
        match (property.expectation, checker.discovery(property.name)) {
            (Expectation::Always, Some(path)) => {
                panic!("not \"{}\" after\n{}", property.name, tell(path))
            }
            (Expectation::Sometimes, Some(_)) => drop(reached.insert(property.name)),
            _ => {}
        }
    }
    reached
}

fn explore_all(all: &[(&str, Bounds)]) {
    let reached: BTreeSet<_> = all.iter().flat_map(|(name, bounds)| explore(name, *bounds)).collect();
    let wanted = properties::all().into_iter().filter(|it| it.expectation == Expectation::Sometimes);
    let missed: Vec<_> = wanted.map(|it| it.name).filter(|name| !reached.contains(name)).collect();
    assert!(missed.is_empty(), "never reached, so nothing was proved about it: {missed:#?}");
}

#[test]
fn every_order_of_events_keeps_the_promises() {
    explore_all(&USUAL);
}

#[test]
fn larger_bounds_keep_the_promises() {
    if std::env::var("BATON_PROOF").is_ok_and(|proof| proof == "model") {
        LARGER.iter().for_each(|(name, bounds)| drop(explore(name, *bounds)));
    } else {
        println!("larger bounds are left to `make proof-model`");
    }
}

/// The steps of a counterexample, messages in full.
fn tell(path: Path<State, Action>) -> String {
    let steps = path.into_vec().into_iter().filter_map(|(state, action)| Some((state, action?)));
    let told = steps.map(|(state, action)| match action {
        Action::Deliver(at) => format!("    Deliver {:?}\n", state.network.0[at]),
        Action::Copy(at) => format!("    Deliver and keep {:?}\n", state.network.0[at]),
        Action::Lose(at) | Action::Damage(at) => format!("    {action:?}: {:?}\n", state.network.0[at]),
        action => format!("    {action:?}\n"),
    });
    told.collect()
}

/// Runs until this promise is broken.
fn find_out(broken: Broken, promise: &'static str, bounds: Bounds) {
    let began = Instant::now();
    let model = Protocol { bounds, broken: Some(broken) };
    let wanted = HasDiscoveries::AnyOf(BTreeSet::from([promise]));
    let checker = model.checker().finish_when(wanted).spawn_bfs().join();
    let path = checker.discovery(promise).unwrap_or_else(|| panic!("{broken:?} keeps \"{promise}\""));
    let (states, seconds) = (checker.unique_state_count(), began.elapsed().as_secs_f32());
    println!("{broken:?}: not \"{promise}\" ({states} states, {seconds:.1} s) after\n{}", tell(path));
}

#[test]
fn a_machine_that_breaks_a_rule_is_found_out() {
    let faults = |faults| Bounds { faults, ..DELIVERY };
    find_out(Broken::NoEpochCheck, SAME_TOKEN, EPOCHS);
    find_out(Broken::EarlyFree, FREED_LAST, DELIVERY);
    find_out(Broken::DoubleFree, FREED_ONCE, DELIVERY);
    find_out(Broken::DoubleRelease, FREED_ONCE, DELIVERY);
    find_out(Broken::StartsIncomplete, COMPLETE, DELIVERY);
    find_out(Broken::IgnoresCancel, CANCELLED, DELIVERY);
    find_out(Broken::LateCommit, SAME_TOKEN, EPOCHS);
    find_out(Broken::NoDigest, COMPLETE, faults(Faults { damages: 1, ..NONE }));
    find_out(Broken::RepeatsFirst, FIRST_ONCE, DELIVERY);
    find_out(Broken::SeveredEnded, FREED_LAST, DELIVERY);
    find_out(Broken::LostEnded, FREED_LAST, faults(Faults { hangs: 1, ..NONE }));
}
