//! What a seed does to a cluster, and when. Every fault ends by itself: what was killed is started again,
//! what was blocked is opened, so that afterwards the cluster must be whole.

use crate::{cluster::Cluster, nature::Chance, shape::Shape};
use std::{sync::atomic::Ordering, time::Duration};
use tokio::time::sleep;

#[derive(Clone, Debug)]
pub struct Fault {
    pub at: Duration,
    pub lasts: Duration,
    pub what: What,
}

/// Hosts are named, whatever incarnation is there then.
#[derive(Clone, Debug)]
pub enum What {
    /// SIGKILL; started again afterwards.
    Kill(String),
    /// SIGTERM; started again afterwards.
    Terminate(String),
    /// SIGSTOP and SIGCONT.
    Pause(String),
    /// The device breaks, and the process ends by itself; started again afterwards.
    Fail(String),
    /// The engine stands still, the sockets do not.
    Hang(String),
    /// Nothing goes from the one to the other.
    Block(String, String),
    Slow(String, String, Duration),
    /// All connections between two hosts break, once.
    Cut(String, String),
    /// A host does not reach the membership: its lease runs out.
    Unleash(String),
    /// Nobody reaches the membership.
    Outage,
}

/// By their time.
pub fn faults(seed: u64, shape: &Shape) -> Vec<Fault> {
    let mut chance = Chance::new(seed, "faults");
    let count = *chance.of(&[0, 1, 1, 2, 2, 3, 5, 8]);
    let mut faults: Vec<Fault> = (0..count).map(|_| fault(shape, &mut chance)).collect();
    faults.sort_by_key(|fault| fault.at);
    faults
}

fn fault(shape: &Shape, chance: &mut Chance) -> Fault {
    let names = shape.names();
    let workers: Vec<&String> = names.iter().filter(|name| !name.starts_with(['g', 'r'])).collect();
    let not_gateway: Vec<&String> = names.iter().filter(|name| !name.starts_with('g')).collect();
    let worker = (*chance.of(&workers)).clone();
    let (one, other) = (chance.of(&names).clone(), chance.of(&names).clone());
    let what = match chance.within(0, 15) {
        0..3 => What::Kill((*chance.of(&not_gateway)).clone()),
        3 => What::Terminate(worker),
        4 | 5 => What::Pause(worker),
        6 | 7 => What::Hang(worker),
        8 | 9 => What::Block(one, other),
        10 => What::Slow(one, other, Duration::from_millis(*chance.of(&[10, 100, 400]))),
        11 => What::Cut(one, other),
        12 => What::Fail(worker),
        13 => What::Unleash((*chance.of(&not_gateway)).clone()),
        _ => What::Outage,
    };
    let lasts = Duration::from_millis(*chance.of(&[50, 300, 1_000, 3_000, 6_000]));
    Fault { at: Duration::from_millis(chance.within(0, 6_000)), lasts, what }
}

/// Does it, waits, undoes it.
pub async fn commit(cluster: Cluster, fault: Fault) {
    sleep(fault.at).await;
    cluster.net.journal.note("fault", format!("{:?} for {:?}", fault.what, fault.lasts));
    let lasts = fault.lasts;
    match fault.what {
        What::Kill(name) => {
            cluster.kill(&name);
            sleep(lasts).await;
            restart(&cluster, &name);
        }
        What::Terminate(name) => {
            cluster.terminate(&name).await;
            sleep(lasts).await;
            restart(&cluster, &name);
        }
        What::Pause(name) => pause(&cluster, &name, lasts).await,
        What::Fail(name) => {
            let Some(worker) = cluster.worker_named(&name) else { return };
            worker.controls.failing.store(true, Ordering::Relaxed);
            sleep(lasts).await;
            cluster.replace(&name);
        }
        What::Hang(name) => {
            let Some(worker) = cluster.worker_named(&name) else { return };
            worker.controls.hung.send_replace(true);
            sleep(lasts).await;
            worker.controls.hung.send_replace(false);
        }
        What::Block(from, to) => {
            let (Some(from), Some(to)) = (cluster.id(&from), cluster.id(&to)) else { return };
            cluster.net.block(&from, &to, true);
            sleep(lasts).await;
            cluster.net.block(&from, &to, false);
        }
        What::Slow(from, to, delay) => {
            let (Some(from), Some(to)) = (cluster.id(&from), cluster.id(&to)) else { return };
            cluster.net.slow(&from, &to, delay);
            sleep(lasts).await;
            cluster.net.slow(&from, &to, Duration::ZERO);
        }
        What::Cut(one, other) => {
            let (Some(one), Some(other)) = (cluster.id(&one), cluster.id(&other)) else { return };
            cluster.net.cut(&one, &other);
        }
        What::Unleash(name) => {
            let Some(id) = cluster.id(&name) else { return };
            cluster.members.connect(&id, false);
            sleep(lasts).await;
            // One that has been killed meanwhile stays away.
            if cluster.id(&name).as_ref() == Some(&id) {
                cluster.members.connect(&id, true);
            }
        }
        What::Outage => {
            cluster.members.stop();
            sleep(lasts).await;
            cluster.members.start();
        }
    }
    cluster.net.journal.note("fault", "is over");
}

fn restart(cluster: &Cluster, name: &str) {
    if cluster.id(name).is_none() {
        cluster.start_host(name);
    }
}

/// Neither engine nor sockets nor lease go on.
async fn pause(cluster: &Cluster, name: &str, lasts: Duration) {
    let (Some(id), Some(worker)) = (cluster.id(name), cluster.worker_named(name)) else { return };
    cluster.net.pause(&id, true);
    cluster.members.connect(&id, false);
    worker.controls.hung.send_replace(true);
    sleep(lasts).await;
    worker.controls.hung.send_replace(false);
    if cluster.id(name).as_ref() == Some(&id) {
        cluster.members.connect(&id, true);
    }
    cluster.net.pause(&id, false);
}
