//! What must be true of a cluster: all the time, of every answer, and once nothing runs any more.

use crate::{
    client::{Answer, Outcome, send},
    cluster::Cluster,
    workload::{Ask, probe},
};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use proto::{StatusReply, StatusRequest, router_client::RouterClient};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Endpoint;

/// Between two looks at everything that lives.
const LOOK: Duration = Duration::from_millis(20);
/// For a healthy process to say how it is.
const PROMPT: Duration = Duration::from_secs(2);

/// Watches until a rule is broken.
pub async fn watch(cluster: Cluster) -> String {
    for look in 0u64.. {
        if let Err(violation) = look_at(&cluster, look).await {
            return violation;
        }
        sleep(LOOK).await;
    }
    unreachable!("there are enough numbers")
}

async fn look_at(cluster: &Cluster, look: u64) -> Result<(), String> {
    for (id, worker) in cluster.workers() {
        let Some(engine) = worker.engine.get() else { continue };
        let load = *engine.load().borrow();
        if load.waiting > cluster.shape.worker("both").waiting {
            return Err(format!("{id}: {} sequences wait", load.waiting));
        }
        // A pool that is being counted may lose its engine, which is no violation.
        if let Ok(Err(violation)) = timeout(PROMPT, engine.check_pool()).await
            && violation.contains("block")
        {
            return Err(format!("{id}: {violation}"));
        }
    }
    if look.is_multiple_of(25) {
        bounds_of_routers(cluster).await?;
    }
    Ok(())
}

/// A request that moves is never refused for want of room: it may wait beside a full queue, and counts as running
/// all the while.
async fn bounds_of_routers(cluster: &Cluster) -> Result<(), String> {
    let config = cluster.shape.router();
    for (name, status) in statuses(cluster).await {
        let queued: u32 = status.queue.iter().map(|class| class.depth).sum();
        let (queued, running) = (queued as usize, status.running as usize);
        if queued > config.queue.limit + running || running > config.running {
            return Err(format!("{name}: {queued} queued, {running} running"));
        }
    }
    Ok(())
}

/// Of every router that answers.
async fn statuses(cluster: &Cluster) -> BTreeMap<String, StatusReply> {
    let mut statuses = BTreeMap::new();
    for name in (0..cluster.shape.routers).map(|at| format!("router-{at}")) {
        let endpoint = Endpoint::from_shared(format!("http://{name}:7000")).expect("an address");
        let mut client = RouterClient::new(cluster.net.dialing("observer").channel(&endpoint));
        if let Ok(Ok(status)) = timeout(PROMPT, client.status(StatusRequest {})).await {
            statuses.insert(name, status.into_inner());
        }
    }
    statuses
}

/// Of a request, beside what an undisturbed cluster answers.
pub fn outcome(ask: &Ask, outcome: &Outcome, right: &Answer, calm: bool) -> Result<(), String> {
    let broken =
        |what: &str| Err(format!("{}: {what}\n  right would be {right:?}\n  it {outcome}", ask.name));
    match outcome {
        Outcome::Odd(_) => broken("neither an answer nor an error"),
        Outcome::Answered(answer) if answer != right => broken("another answer"),
        Outcome::Failed(_, part) | Outcome::Left(part) if !part.begins(right) => broken("another beginning"),
        Outcome::Failed(..) if calm => broken("an error, though nothing was disturbed"),
        Outcome::Failed(failure, _) if !is_clear(&failure.code) => broken("an error that explains nothing"),
        Outcome::Answered(_) | Outcome::Failed(..) | Outcome::Left(_) => Ok(()),
    }
}

/// An error that a disturbed cluster may give.
fn is_clear(code: &str) -> bool {
    ["worker_lost", "server_overloaded", "timeout"].contains(&code)
}

/// Waits until nothing is held anywhere; what still is, if that takes longer than `patience`.
pub async fn settles(cluster: &Cluster, patience: Duration) -> Result<Duration, String> {
    let began = Instant::now();
    loop {
        let Some(held) = held(cluster).await else { return Ok(began.elapsed()) };
        if began.elapsed() > patience {
            return Err(format!("still held {patience:?} after the last request: {held}"));
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn held(cluster: &Cluster) -> Option<String> {
    for (id, worker) in cluster.workers() {
        let Some(engine) = worker.engine.get() else { return Some(format!("{id} has not started")) };
        let load = *engine.load().borrow();
        let counts = match timeout(PROMPT, engine.check_pool()).await {
            Ok(Ok(counts)) => counts,
            Ok(Err(problem)) => return Some(format!("{id}: {problem}")),
            Err(_) => return Some(format!("{id}: the engine does not answer")),
        };
        let sequences = load.running + load.waiting + load.reserved;
        if counts.held + counts.quarantined + sequences > 0 {
            return Some(format!("{id}: {counts:?}, {sequences} sequences"));
        }
    }
    let statuses = statuses(cluster).await;
    if statuses.len() as u64 != cluster.shape.routers {
        return Some("a router does not answer".to_owned());
    }
    let busy =
        statuses.iter().find(|(_, status)| status.running > 0 || status.queue.iter().any(|q| q.depth > 0));
    busy.map(|(name, status)| format!("{name}: {} running, {:?} queued", status.running, status.queue))
}

/// What services count of themselves, summed over those that live: how often the ways were taken that faults
/// lead to.
pub async fn counts(cluster: &Cluster) -> Result<BTreeMap<String, u64>, String> {
    let mut counts = BTreeMap::new();
    for name in cluster.shape.names().iter().filter(|name| !name.starts_with('g')) {
        for line in metrics(cluster, name).await.unwrap_or_default().lines() {
            let Some((metric, value)) = line.rsplit_once(' ') else { continue };
            if COUNTED.iter().any(|counted| metric.starts_with(counted)) {
                *counts.entry(metric.to_owned()).or_default() += value.parse().unwrap_or(0);
            }
        }
    }
    counts.retain(|_, count| *count > 0);
    match counts.get(DISORDER) {
        Some(count) => {
            Err(format!("{count} tokens were lost, repeated or contradicted between workers and routers"))
        }
        None => Ok(counts),
    }
}

const DISORDER: &str = "baton_router_token_order_violations_total";
const COUNTED: [&str; 4] =
    [DISORDER, "baton_migrations_total", "baton_handoffs_total", "baton_router_placements_total"];

async fn metrics(cluster: &Cluster, name: &str) -> anyhow::Result<String> {
    let conn = cluster.net.dial("observer", &format!("{name}:7001")).await?;
    let (mut sender, connection) = http1::handshake::<_, Empty<Bytes>>(TokioIo::new(conn)).await?;
    let driving = tokio::spawn(connection);
    let request = Request::get("/metrics").header("host", name).body(Empty::new())?;
    let body = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
    driving.abort();
    Ok(String::from_utf8(body.to_vec())?)
}

/// A cluster that is whole again serves, within `patience`.
pub async fn serves(cluster: &Cluster, patience: Duration) -> Result<Duration, String> {
    let began = Instant::now();
    for number in 0.. {
        let outcome = send(&cluster.net, &probe(number)).await;
        match outcome {
            Outcome::Answered(_) => return Ok(began.elapsed()),
            _ if began.elapsed() > patience => {
                return Err(format!("serves nothing after {patience:?}: {outcome}"));
            }
            _ => sleep(Duration::from_millis(200)).await,
        }
    }
    unreachable!("there are enough numbers")
}
