//! The tables of PROTOCOL.md are what the machines do: each machine is led into every situation and told every event, and the
//! page must say what came of it. `BATON_TABLES=write` writes them anew.

use handoff::{
    Now, Patience,
    placement::{self, Placement},
    receiver::{self, Receiver},
    sender::{self, Sender},
};
use std::{collections::BTreeMap, fmt::Debug, path::Path, time::Duration};

const LANDING: Now = Duration::from_secs(5);
const SILENCE: Now = Duration::from_secs(10);
const DELIVERY: Now = Duration::from_secs(30);

/// What a machine in one situation made of one event.
struct Outcome {
    event: &'static str,
    situation: &'static str,
    next: String,
    actions: String,
}

/// Rows that are equal but for the situation are one.
fn table(situations: usize, outcomes: Vec<Outcome>) -> String {
    let mut rows: Vec<(Outcome, Vec<&str>)> = Vec::new();
    for outcome in outcomes.into_iter().filter(|it| (&*it.next, &*it.actions) != ("same", "—")) {
        let alike = |row: &&mut (Outcome, Vec<&str>)| {
            (row.0.event, &row.0.next, &row.0.actions) == (outcome.event, &outcome.next, &outcome.actions)
        };
        match rows.iter_mut().find(alike) {
            Some((_, already)) => already.push(outcome.situation),
            None => rows.push((outcome, vec![])),
        }
    }
    let mut text = String::from("| event | in | next | actions |\n| --- | --- | --- | --- |\n");
    for (Outcome { event, situation, next, actions }, others) in rows {
        let all = [vec![situation], others].concat();
        let within = if all.len() == situations { "any".to_owned() } else { all.join("; ") };
        text += &format!("| {event} | {within} | {next} | {actions} |\n");
    }
    text
}

/// Every event in every situation. `lead` gives a fresh machine in a situation, `say` what it does and the state it is then in.
fn explore<E: Clone, M>(
    situations: &[(&'static str, Vec<E>)],
    events: &[(&'static str, E, Now)],
    new: impl Fn() -> M,
    say: impl Fn(&mut M, E, Now) -> (String, Vec<String>),
    state: impl Fn(&M) -> String,
) -> String {
    let mut outcomes = Vec::new();
    for (event, said, now) in events {
        for (situation, before) in situations {
            let mut machine = new();
            before.iter().for_each(|event| drop(say(&mut machine, event.clone(), Now::ZERO)));
            let was = state(&machine);
            let (is, actions) = say(&mut machine, said.clone(), *now);
            let next = if is == was { "same".to_owned() } else { is };
            let actions = if actions.is_empty() { "—".to_owned() } else { actions.join(", ") };
            outcomes.push(Outcome { event, situation, next, actions });
        }
    }
    table(situations.len(), outcomes)
}

fn debug(value: impl Debug) -> String {
    format!("{value:?}").replace("Duration", "")
}

/// Two blocks, the first one here; epoch 2 owns the reservation, and its stream is open.
fn receiver() -> String {
    use receiver::{Action, Event};
    let offer = Event::Offer { epoch: 2, index: 1 };
    let commit = Event::Commit { epoch: 2, finished: false };
    let last = Event::Commit { epoch: 2, finished: true };
    let (written, open) = (Event::Written { index: 1 }, Event::Open { epoch: 2 });
    let situations = [
        ("Receiving: no stream", vec![]),
        ("missing", vec![open.clone()]),
        ("writing", vec![offer.clone()]),
        ("accepted", vec![offer.clone(), written.clone()]),
        ("missing, committed", vec![commit.clone()]),
        ("writing, committed", vec![offer.clone(), commit.clone()]),
        ("writing for epoch 1", vec![offer.clone(), Event::Advance { epoch: 2 }]),
        ("Complete", vec![offer.clone(), written.clone(), commit.clone()]),
        ("Quarantined", vec![offer.clone(), Event::Cancel]),
        ("Quarantined, finished", vec![offer.clone(), last.clone()]),
        ("Closed", vec![Event::Cancel]),
        ("Closed, finished", vec![last.clone()]),
    ];
    // Every situation is of epoch 2, however it came about.
    let situations = situations.map(|(name, events)| {
        let first = |event: &Event| match event {
            Event::Offer { index, .. } => Event::Offer { epoch: 1, index: *index },
            Event::Advance { .. } => Event::Advance { epoch: 1 },
            other => other.clone(),
        };
        match name {
            "writing for epoch 1" => (name, events.iter().map(first).collect()),
            _ => (name, [vec![Event::Advance { epoch: 1 }], events].concat()),
        }
    });
    let events = [
        ("Open", open, Now::ZERO),
        ("Open, Heartbeat, Offer or Commit of epoch 1", Event::Offer { epoch: 1, index: 1 }, Now::ZERO),
        ("Offer", offer, Now::ZERO),
        ("Offer of no block of the sequence", Event::Offer { epoch: 2, index: 9 }, Now::ZERO),
        ("Written", written, Now::ZERO),
        ("Spoiled", Event::Spoiled { index: 1 }, Now::ZERO),
        ("Astray", Event::Astray { index: 1 }, Now::ZERO),
        ("Commit", commit, Now::ZERO),
        ("Commit, finished", last, Now::ZERO),
        ("Advance of epoch 2", Event::Advance { epoch: 2 }, Now::ZERO),
        ("Advance of epoch 1, again", Event::Advance { epoch: 1 }, Now::ZERO),
        ("Advance of epoch 3", Event::Advance { epoch: 3 }, Now::ZERO),
        ("Tick, a write overdue", Event::Tick, LANDING),
        ("Tick, nothing heard for `silence`", Event::Tick, SILENCE),
        ("Tick, nothing heard for `delivery`", Event::Tick, DELIVERY),
        ("Cancel", Event::Cancel, Now::ZERO),
    ];
    let patience = Patience { silence: SILENCE, delivery: DELIVERY, landing: LANDING };
    let told = |action: Action| match action {
        Action::Reply { epoch: 2, reply } => format!("Reply({reply:?})"),
        Action::Reply { epoch, reply } => format!("Reply to epoch {epoch}({reply:?})"),
        other => debug(other),
    };
    explore(
        &situations,
        &events,
        || Receiver::new(2, 1, patience, Now::ZERO),
        |it, event, now| {
            let actions = it.on(event, now).into_iter().map(told).collect();
            (debug(it.state()), actions)
        },
        |it| debug(it.state()),
    )
}

/// Two blocks, of which decode has the first; one may be under way, and be offered twice.
fn sender() -> String {
    use sender::Event;
    let computed = [0, 1].map(|index| Event::Computed { index });
    let [fetched, accepted, refused] =
        [Event::Fetched { index: 1 }, Event::Accepted { index: 1 }, Event::Refused { index: 1 }];
    let (token, last) = (Event::FirstToken { finished: false }, Event::FirstToken { finished: true });
    let offered = vec![computed[1].clone(), fetched.clone()];
    let then = |events: &[Event], more: &[Event]| [events, more].concat();
    let situations = [
        ("Sending: nothing computed", vec![]),
        ("reading", vec![computed[1].clone()]),
        ("offered", offered.clone()),
        ("refused once, offered", then(&offered, &[refused.clone(), fetched.clone()])),
        ("accepted", then(&offered, std::slice::from_ref(&accepted))),
        ("token known, nothing computed", vec![token.clone()]),
        ("token known, reading", vec![token.clone(), computed[1].clone()]),
        ("Committing: offered", then(&offered, std::slice::from_ref(&token))),
        ("accepted, committed", then(&offered, &[accepted.clone(), token.clone()])),
        ("finished", vec![last.clone()]),
        ("Done", then(&offered, &[accepted.clone(), token.clone(), Event::Committed])),
        ("Failed", vec![Event::Broken]),
    ];
    let events = [
        ("Computed, decode has it", computed[0].clone(), Now::ZERO),
        ("Computed", computed[1].clone(), Now::ZERO),
        ("Fetched", fetched, Now::ZERO),
        ("FirstToken", token, Now::ZERO),
        ("FirstToken, finished", last, Now::ZERO),
        ("Accepted", accepted, Now::ZERO),
        ("Refused", refused, Now::ZERO),
        ("Committed", Event::Committed, Now::ZERO),
        ("Heartbeat", Event::Heartbeat, Now::ZERO),
        ("Broken", Event::Broken, Now::ZERO),
        ("Tick, nothing heard for `silence`", Event::Tick, SILENCE),
    ];
    let bounds = sender::Bounds { window: 1, tries: 2, silence: SILENCE };
    explore(
        &situations,
        &events,
        || Sender::new(2, |index| index == 0, bounds, Now::ZERO),
        |it, event, now| {
            let actions = it.on(event, now).into_iter().map(debug).collect();
            (debug(it.state()), actions)
        },
        |it| debug(it.state()),
    )
}

/// Two prefills may be asked; token 7 is the first.
fn placement() -> String {
    use placement::{Action, Event};
    let reserved = Event::Reserved { reservation: 1, epoch: 1, present: 1 };
    let token = |epoch| Event::FirstToken { epoch, token: 7 };
    let lost = |epoch| Event::PrefillLost { epoch };
    let (delivered, decoding) = (Event::Delivered { epoch: 1 }, Event::Decoding { token: 7 });
    let advanced = Event::Advanced { epoch: 2, accepted: vec![1] };
    let situations = [
        ("Reserving", vec![]),
        ("Prefilling", vec![reserved.clone()]),
        ("Prefilling, token given", vec![reserved.clone(), token(1)]),
        ("Advancing", vec![reserved.clone(), lost(1)]),
        ("Advancing, token given", vec![reserved.clone(), token(1), lost(1)]),
        ("Prefilling, the last", vec![reserved.clone(), lost(1), advanced.clone()]),
        ("Delivered", vec![reserved.clone(), token(1), delivered.clone()]),
        ("Delivered, no token", vec![reserved.clone(), lost(1), Event::AlreadyComplete]),
        ("Decoding", vec![reserved.clone(), token(1), decoding.clone()]),
        ("Decoding, prefill here", vec![Event::LocalPrefill]),
        ("Ended", vec![Event::DecodeLost]),
    ];
    let events = [
        ("Reserved", reserved),
        ("LocalPrefill", Event::LocalPrefill),
        ("FirstToken of epoch 1", token(1)),
        ("FirstToken of epoch 2", token(2)),
        ("Delivered of epoch 1", delivered),
        ("PrefillLost of epoch 1", lost(1)),
        ("PrefillLost of epoch 2", lost(2)),
        ("Advanced to epoch 2", advanced),
        ("AlreadyComplete", Event::AlreadyComplete),
        ("Decoding", decoding),
        ("Token", Event::Token),
        ("Finished", Event::Finished),
        ("Preempted", Event::Preempted),
        ("DecodeLost", Event::DecodeLost),
    ];
    let events = events.map(|(name, event)| (name, event, Now::ZERO));
    let told = |action: Action| match action {
        Action::AskPrefill { epoch, accepted, forced, .. } => {
            format!("AskPrefill {{ epoch: {epoch}, accepted: {accepted:?}, forced: {forced:?} }}")
        }
        Action::Advance { epoch, .. } => format!("Advance {{ epoch: {epoch} }}"),
        other => debug(other),
    };
    explore(
        &situations,
        &events,
        || Placement::new(2),
        |it, event, _| {
            let actions = it.on(event).into_iter().map(told).collect();
            (debug(it.state()), actions)
        },
        |it| debug(it.state()),
    )
}

#[test]
fn the_page_says_what_the_machines_do() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("PROTOCOL.md");
    let page = std::fs::read_to_string(&path).expect("the page is there");
    let mut truth = page.clone();
    for (name, table) in
        BTreeMap::from([("receiver", receiver()), ("sender", sender()), ("placement", placement())])
    {
        let (begin, end) = (format!("<!-- table: {name} -->\n"), format!("<!-- end: {name} -->"));
        let from = truth.find(&begin).unwrap_or_else(|| panic!("{begin} is missing")) + begin.len();
        let to = from + truth[from..].find(&end).unwrap_or_else(|| panic!("{end} is missing"));
        truth.replace_range(from..to, &table);
    }
    if std::env::var_os("BATON_TABLES").is_some_and(|value| value == "write") {
        std::fs::write(&path, &truth).expect("the page can be written");
        return;
    }
    let wrong = page.lines().zip(truth.lines()).find(|(page, truth)| page != truth);
    assert!(
        page == truth,
        "PROTOCOL.md differs from the machines, first here (page, machine): {wrong:#?}\n\
         if the machine is right, write the tables anew: BATON_TABLES=write cargo test -p handoff --test tables"
    );
}
