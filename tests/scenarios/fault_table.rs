//! The table of faults: under a steady load of 32 streams, each role is killed and stopped in each phase of a request, links
//! are cut in one direction, packets lost, etcd and routers taken away, every worker replaced. After each fault, every
//! answer equals the undisturbed one, every stream flows again, and no block is held.

use crate::harness::{
    alone, block_on,
    deployment::{Deployment, Service},
    is_proof,
    load::{self, Load, Question},
    network::Network,
    table::{Row, Table},
};
use rustix::process::Signal;
use std::time::{Duration, Instant};
use tokio::time::sleep;

const STREAMS: usize = 32;
/// For all streams to flow again, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);
/// For blocks to be free once the load has ended: longer than a silent router is borne with.
const FREE: Duration = Duration::from_secs(45);
const PHASES: [&str; 5] = ["reserved", "prefilling", "offering", "committed", "decoding"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    Prefill,
    Decode,
    Router,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    Kill(Role, &'static str),
    Stop(Role, &'static str),
    /// What the first sends does not reach the second.
    Cut(&'static str, &'static str),
    Loss,
    EtcdLeader,
    EtcdAll(Duration),
    Workers,
    Routers,
}

#[test]
fn fault_table() {
    let _alone = alone();
    if let Some(lack) = Network::lacks() {
        println!("SKIPPED: the table of faults is not made here: {lack}");
        return;
    }
    let (cases, proof) = if is_proof("faults") { (every_case(), true) } else { (one_case_a_role(), false) };
    let mut network = Network::new();
    let here = network.host();
    let table = here.run(|| block_on(make(network, cases)));
    println!("{}", table.markdown());
    if proof {
        table.write("faults");
    }
    table.assert_sound();
}

fn one_case_a_role() -> Vec<Fault> {
    vec![
        Fault::Kill(Role::Prefill, "offering"),
        Fault::Kill(Role::Decode, "decoding"),
        Fault::Kill(Role::Router, "committed"),
    ]
}

fn every_case() -> Vec<Fault> {
    let roles = [Role::Prefill, Role::Decode, Role::Router];
    let each = |fault: fn(Role, &'static str) -> Fault| {
        roles.into_iter().flat_map(move |role| PHASES.map(|phase| fault(role, phase)))
    };
    let cuts = [
        ("router", "decode-1"),
        ("decode-1", "router"),
        ("router", "prefill-1"),
        ("prefill-1", "router"),
        ("prefill-1", "decode-1"),
        ("decode-1", "prefill-1"),
        ("gateway", "router"),
        ("router", "gateway"),
    ];
    let others = [
        Fault::Loss,
        Fault::EtcdLeader,
        Fault::EtcdAll(Duration::from_secs(60)),
        Fault::Workers,
        Fault::Routers,
    ];
    std::iter::once(Fault::None)
        .chain(each(Fault::Kill))
        .chain(each(Fault::Stop))
        .chain(cuts.map(|(from, to)| Fault::Cut(from, to)))
        .chain(others)
        .collect()
}

async fn make(network: Network, cases: Vec<Fault>) -> Table {
    let mut cluster = Deployment::start(network).await;
    let questions = load::undisturbed(&cluster.http, load::bodies(STREAMS)).await;
    let mut table = Table::new(STREAMS);
    for case in cases {
        let row = run(&mut cluster, &questions, case).await;
        println!("{}", row.line());
        table.rows.push(row);
    }
    table
}

/// One fault under load, to the last answer.
async fn run(cluster: &mut Deployment, questions: &[Question], case: Fault) -> Row {
    let load = Load::default();
    let client = cluster.http.clone();
    let before = disturbances(cluster).await;
    let inject = async {
        sleep(Duration::from_millis(1500)).await;
        let began = Instant::now();
        let (since, in_flight) = inject(cluster, &load, case).await;
        let recovered = load.flows_after(since + Duration::from_millis(300), RECOVERY).await;
        let pause = load.longest_pause(since);
        restore(cluster, case).await;
        sleep(Duration::from_secs(1)).await;
        load.stop();
        (in_flight, recovered.then_some(pause), began.elapsed())
    };
    let ((in_flight, pause, took), ()) = tokio::join!(inject, load.run(&client, questions));
    // Who was started again may still be on its way.
    cluster.whole().await;
    let leaked = cluster.leaked(FREE).await;
    let moved = moved(&before, &disturbances(cluster).await);
    let served = load.served.load(std::sync::atomic::Ordering::Relaxed);
    let (told, differs) = load.faults();
    let (fault, phase) = name(case);
    Row { fault, phase, in_flight, moved, served, told, differs, pause, leaked, took }
}

fn name(case: Fault) -> (String, &'static str) {
    let of = |role: Role| format!("{role:?}").to_lowercase();
    match case {
        Fault::None => ("none".into(), ""),
        Fault::Kill(role, phase) => (format!("{} SIGKILL", of(role)), phase),
        Fault::Stop(role, phase) => (format!("{} SIGSTOP", of(role)), phase),
        Fault::Cut(from, to) => (format!("{from} does not reach {to}"), ""),
        Fault::Loss => ("5 % of all packets lost".into(), ""),
        Fault::EtcdLeader => ("etcd leader SIGKILL".into(), ""),
        Fault::EtcdAll(time) => {
            (format!("all etcd gone for {} s, a worker replaced meanwhile", time.as_secs()), "")
        }
        Fault::Workers => ("every worker drained and replaced".into(), ""),
        Fault::Routers => ("every router stopped and replaced".into(), ""),
    }
}

/// Does it, and lets it last. When, and how many requests were in flight then.
async fn inject(cluster: &mut Deployment, load: &Load, case: Fault) -> (Instant, usize) {
    match case {
        Fault::Kill(role, phase) => return strike(cluster, load, role, phase, Signal::KILL).await,
        Fault::Stop(role, phase) => return strike(cluster, load, role, phase, Signal::STOP).await,
        _ => {}
    }
    let struck = (Instant::now(), load.in_flight());
    match case {
        Fault::Cut(from, to) => cut(cluster, from, to).await,
        Fault::Loss => cluster.services().for_each(|service| service.host.lose_packets()),
        Fault::EtcdLeader => cluster.etcd.kill(cluster.etcd.leader().unwrap_or(0)),
        Fault::EtcdAll(time) => etcd_gone(cluster, time).await,
        Fault::Workers => replace(cluster, &["prefill-1", "decode-1", "prefill-2", "decode-2"]).await,
        Fault::Routers => replace(cluster, &["router-1", "router-2"]).await,
        Fault::None | Fault::Kill(..) | Fault::Stop(..) => {}
    }
    sleep(lasting(case)).await;
    struck
}

/// Long enough for new requests to meet it too.
fn lasting(case: Fault) -> Duration {
    match case {
        Fault::Cut(..) | Fault::EtcdLeader => Duration::from_secs(8),
        Fault::Loss => Duration::from_secs(15),
        Fault::None => Duration::from_secs(5),
        _ => Duration::ZERO,
    }
}

async fn cut(cluster: &Deployment, from: &str, to: &str) {
    let router = cluster.active_router().await;
    let named = |name: &str| if name == "router" { router } else { cluster.service(name) };
    named(to).host.drop_from(&named(from).host);
}

/// A worker that starts meanwhile has to wait with its join; its former self must not be taken for it.
async fn etcd_gone(cluster: &mut Deployment, time: Duration) {
    cluster.etcd.kill_all();
    sleep(time / 2).await;
    cluster.service_mut("decode-2").start_again();
    sleep(time / 2).await;
}

/// One after another and in good order: their ends say success.
async fn replace(cluster: &mut Deployment, names: &[&str]) {
    for name in names {
        let service = cluster.service_mut(name);
        service.signal(Signal::TERM);
        let status = service.ended().await;
        assert!(status.success(), "{name} ended with {status}");
        service.start_again();
        cluster.whole().await;
    }
}

async fn victim(cluster: &Deployment, role: Role) -> String {
    match role {
        Role::Prefill => "prefill-1".into(),
        Role::Decode => "decode-1".into(),
        Role::Router => cluster.active_router().await.name.clone(),
    }
}

/// Signals a process of `role` while requests are held in `phase`, then lets them go.
async fn strike(
    cluster: &Deployment,
    load: &Load,
    role: Role,
    phase: &str,
    signal: Signal,
) -> (Instant, usize) {
    let victim = victim(cluster, role).await;
    let holders = holders(cluster, phase);
    for holder in &holders {
        holder.hold(phase, true).await;
    }
    until_held(&holders, phase).await;
    cluster.service(&victim).signal(signal);
    let struck = (Instant::now(), load.in_flight());
    release(cluster, phase, &victim).await;
    struck
}

async fn until_held(holders: &[&Service], phase: &str) {
    let deadline = Instant::now() + RECOVERY;
    loop {
        let mut held = Vec::new();
        for holder in holders {
            held.push(holder.held(phase).await);
        }
        if held.iter().all(|held| *held > 0) && held.iter().sum::<u64>() >= 4 {
            return;
        }
        assert!(Instant::now() < deadline, "no requests come into the phase {phase}: {held:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A stopped process lets go when it goes on; see [`restore`].
async fn release(cluster: &Deployment, phase: &str, but: &str) {
    for holder in holders(cluster, phase).into_iter().filter(|holder| holder.name != but) {
        holder.hold(phase, false).await;
    }
}

/// Who holds requests in a phase.
fn holders<'a>(cluster: &'a Deployment, phase: &str) -> Vec<&'a Service> {
    let role = if ["committed", "decoding"].contains(&phase) { "decode" } else { "prefill" };
    cluster.workers.iter().filter(|worker| worker.role == role).collect()
}

/// Mends what was broken.
async fn restore(cluster: &mut Deployment, case: Fault) {
    match case {
        Fault::Kill(role, _) => {
            let dead = dead(cluster, role);
            cluster.service_mut(&dead).start_again();
        }
        Fault::Stop(_, phase) => {
            for service in cluster.services() {
                service.signal(Signal::CONT);
            }
            for holder in holders(cluster, phase) {
                holder.hold(phase, false).await;
            }
        }
        Fault::Cut(..) | Fault::Loss => cluster.services().for_each(|service| service.host.heal()),
        Fault::EtcdLeader | Fault::EtcdAll(_) => {
            cluster.etcd.restart();
            cluster.whole().await;
        }
        Fault::None | Fault::Workers | Fault::Routers => {}
    }
}

fn dead(cluster: &mut Deployment, role: Role) -> String {
    let role = format!("{role:?}").to_lowercase();
    let services = cluster.routers.iter_mut().chain(&mut cluster.workers);
    let dead = services.filter(|service| service.role == role).find_map(|service| {
        let ended = service.has_ended();
        ended.then(|| service.name.clone())
    });
    dead.expect("the victim is dead")
}

/// Of each router and of the gateway: sequences moved, answers resumed.
async fn disturbances(cluster: &Deployment) -> Vec<f64> {
    let mut counts = vec![cluster.gateway.metric("baton_gateway_resumed_total", "").await];
    for router in &cluster.routers {
        counts.push(router.try_metric("baton_migrations_total", "").await.unwrap_or(0.0));
        counts.push(
            router.try_metric("baton_router_placements_total", "outcome=\"failed\"").await.unwrap_or(0.0),
        );
    }
    counts
}

/// A router that was killed counts from 0 again.
fn moved(before: &[f64], after: &[f64]) -> u64 {
    let grown = |(before, after): (&f64, &f64)| if after >= before { after - before } else { *after };
    before.iter().zip(after).map(grown).sum::<f64>() as u64
}
