//! One seed, from nothing to a verdict.

use crate::{
    check,
    client::{Answer, Outcome, send},
    cluster::Cluster,
    device::Broken,
    faults::{commit, faults},
    journal::Journal,
    nature,
    net::Net,
    shape::Shape,
    workload::{Ask, asks},
};
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// From its beginning within which every request must have ended: it may wait 15 s in a queue.
const ENDS: Duration = Duration::from_secs(20);
/// Of the whole disturbance: requests begin within 8 s, faults end within 14.
const ALL: Duration = Duration::from_secs(30);
/// From the last end within which nothing may be held any more, and from then on within which a request must be
/// answered again.
const RECOVERS: Duration = Duration::from_secs(5);
/// For a whole cluster to serve at first.
const STARTS: Duration = Duration::from_secs(15);

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Verdict {
    pub seed: u64,
    pub hash: u64,
    pub events: u64,
    pub requests: u64,
    pub answered: u64,
    pub left: u64,
    /// By code.
    pub failed: BTreeMap<String, u64>,
    pub faults: u64,
    pub simulated_ms: u64,
    /// What services counted.
    pub counts: BTreeMap<String, u64>,
    /// Of the request that took longest.
    pub longest_ms: u64,
    /// From the last request's end until nothing was held.
    pub settled_ms: u64,
    /// From then until a request was answered.
    pub served_ms: u64,
    pub violation: Option<String>,
}

/// Has this process to itself.
pub fn run(seed: u64, broken: Option<Broken>, aloud: bool) -> Verdict {
    nature::seed(seed);
    let mut chance = nature::Chance::new(seed, "schedule");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .event_interval(chance.within(1, 100) as u32)
        .global_queue_interval(chance.within(2, 50) as u32)
        .build()
        .expect("a runtime without I/O can be built");
    runtime.block_on(async {
        nature::begin();
        let journal = Journal::new(aloud);
        let mut verdict = Verdict { seed, ..Verdict::default() };
        verdict.violation = simulate(seed, broken, &journal, &mut verdict).await.err();
        (verdict.hash, verdict.events) = journal.hash();
        verdict.simulated_ms = nature::now() / 1_000_000;
        verdict
    })
}

async fn simulate(
    seed: u64,
    broken: Option<Broken>,
    journal: &Journal,
    verdict: &mut Verdict,
) -> Result<(), String> {
    let shape = Shape::of(seed);
    let asks = asks(seed, &shape);
    let right = undisturbed(seed, &asks).await?;
    journal.note("shape", format!("{shape:?}"));
    let cluster = Cluster::start(shape, Net::new(seed, journal.clone()), broken);
    check::serves(&cluster, STARTS).await?;
    tokio::select! {
        violation = check::watch(cluster.clone()) => Err(violation),
        outcome = disturbed(&cluster, &asks, &right, verdict) => outcome,
    }
}

/// What each request must be answered: by one worker, all alone.
async fn undisturbed(seed: u64, asks: &[Ask]) -> Result<Vec<Answer>, String> {
    let cluster = Cluster::start(Shape::undisturbed(seed), Net::new(seed, Journal::default()), None);
    check::serves(&cluster, STARTS).await?;
    let mut answers = Vec::new();
    for ask in asks {
        let ask = Ask { leaves_after: None, ..ask.clone() };
        match send(&cluster.net, &ask).await {
            Outcome::Answered(answer) => answers.push(answer),
            other => return Err(format!("undisturbed, {} {other}: {}", ask.name, ask.body)),
        }
    }
    Ok(answers)
}

async fn disturbed(
    cluster: &Cluster,
    asks: &[Ask],
    right: &[Answer],
    verdict: &mut Verdict,
) -> Result<(), String> {
    let faults = faults(cluster.shape.seed, &cluster.shape);
    (verdict.requests, verdict.faults) = (asks.len() as u64, faults.len() as u64);
    let calm = faults.is_empty() && cluster.shape.is_roomy();
    let disturbing = tokio::spawn(join_all(faults.into_iter().map(|fault| commit(cluster.clone(), fault))));
    let requests = join_all(asks.iter().map(|ask| one(cluster, ask)));
    let both = async { tokio::join!(requests, disturbing) };
    let Ok((outcomes, _)) = timeout(ALL, both).await else {
        return Err(format!("a request or a fault has not ended after {ALL:?}"));
    };
    for ((ask, (outcome, took)), right) in asks.iter().zip(&outcomes).zip(right) {
        verdict.count(outcome);
        verdict.longest_ms = verdict.longest_ms.max(took.as_millis() as u64);
        check::outcome(ask, outcome, right, calm)?;
        if *took > ENDS {
            return Err(format!("{} took {took:?}", ask.name));
        }
    }
    cluster.ended().iter().for_each(|name| cluster.replace(name));
    verdict.settled_ms = check::settles(cluster, RECOVERS).await?.as_millis() as u64;
    verdict.served_ms = check::serves(cluster, RECOVERS).await?.as_millis() as u64;
    check::settles(cluster, RECOVERS).await?;
    verdict.counts = check::counts(cluster).await?;
    Ok(())
}

async fn one(cluster: &Cluster, ask: &Ask) -> (Outcome, Duration) {
    sleep(ask.at).await;
    let began = Instant::now();
    let outcome = send(&cluster.net, ask).await;
    cluster.net.journal.note(&ask.name, format!("took {:?}", began.elapsed()));
    (outcome, began.elapsed())
}

impl Verdict {
    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Answered(_) => self.answered += 1,
            Outcome::Left(_) => self.left += 1,
            Outcome::Failed(failure, _) => *self.failed.entry(failure.code.clone()).or_default() += 1,
            Outcome::Odd(_) => {}
        }
    }
}
