//! Real etcd as a source, and what only a cluster of servers can show: the death of one of them.

use crate::{
    etcd_cluster::EtcdCluster,
    suite::{MARGIN, Source, find, ids, joined, member, set_running, until},
};
use membership::{Membership, MembershipConfig, View, connect};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch::Receiver,
    time::{Instant, sleep, timeout},
};

pub struct Etcd {
    cluster: EtcdCluster,
    loses_data: bool,
}

impl Etcd {
    pub fn start(loses_data: bool) -> Self {
        let cluster = EtcdCluster::start(1);
        Self { cluster, loses_data }
    }
}

impl Source for Etcd {
    /// etcd grants two, but then a call among three servers has a third of a second.
    const LEASE: Duration = Duration::from_secs(6);

    fn client(&self) -> Arc<dyn Membership> {
        client(&self.cluster)
    }

    fn stop(&mut self) {
        self.cluster.kill_all();
    }

    fn start_again(&mut self) {
        if self.loses_data {
            self.cluster.wipe();
        }
        self.cluster.restart();
    }
}

fn client(cluster: &EtcdCluster) -> Arc<dyn Membership> {
    client_of(cluster.endpoints())
}

pub fn client_of(endpoints: Vec<String>) -> Arc<dyn Membership> {
    let config = MembershipConfig {
        prefix: "contract".into(),
        lease_ms: Etcd::LEASE.as_millis() as u64,
        ..MembershipConfig::etcd(endpoints)
    };
    connect(config).unwrap()
}

/// Resolves with the first view that lacks a member that never went away.
async fn shrinks(mut view: Receiver<View>) -> String {
    let lacks = |view: &View| (0..3).any(|n| find(view, &format!("m{n}")).is_none());
    let lacking = view.wait_for(lacks).await.map(|view| format!("{view:?}"));
    lacking.unwrap_or_else(|closed| closed.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn any_server_may_die_and_then_all_of_them() {
    let mut cluster = EtcdCluster::start(3);
    let clients: Vec<_> = (0..3).map(|_| client(&cluster)).collect();
    let steady: Vec<_> =
        clients.iter().enumerate().map(|(n, client)| client.join(member(&format!("m{n}")))).collect();
    for registration in &steady {
        joined(registration).await;
    }
    let mut views: Vec<_> = clients.iter().map(|client| client.watch()).collect();
    for view in &mut views {
        until(view, MARGIN, "all there", |view| view.members.len() == 3).await;
    }

    // One after the other dies and comes back, at least one of them the leader, while members join,
    // change and leave. Nobody who lives is ever missing from any view.
    let shrunk: Vec<_> = views.iter().cloned().map(|view| tokio::spawn(shrinks(view))).collect();
    let mut killed_leader = false;
    for (round, client) in clients.iter().enumerate() {
        let leader = cluster.elected();
        let victim = if round == 0 { leader } else { (leader + round) % 3 };
        killed_leader |= victim == leader;
        cluster.kill(victim);
        let start = Instant::now();
        let guest = client.join(member("guest"));
        steady.iter().for_each(|registration| set_running(registration, 1 + round as u32));
        timeout(Duration::from_secs(20), guest.joined()).await.expect("joins go on");
        for view in &mut views {
            until(view, Duration::from_secs(20), "guest and updates", |view| {
                let running = |m: &proto::Member| m.load.is_some_and(|l| l.running == 1 + round as u32);
                view.members.len() == 4 && view.members.iter().filter(|m| running(m)).count() == 3
            })
            .await;
        }
        println!("server {victim} (leader {leader}) killed: went on after {:?}", start.elapsed());
        guest.leave().await;
        for view in &mut views {
            until(view, MARGIN, "guest gone", |view| view.members.len() == 3).await;
        }
        cluster.restart();
    }
    assert!(killed_leader);

    cluster.kill_all();
    for view in &mut views {
        until(view, MARGIN, "disconnected", |view| !view.connected).await;
    }
    sleep(Etcd::BEYOND).await;
    cluster.restart();
    for view in &mut views {
        until(view, MARGIN * 2, "connected", |view| view.connected).await;
    }
    set_running(&steady[0], 99);
    for view in &mut views {
        until(view, MARGIN, "updated", |view| view.members[0].load.is_some_and(|load| load.running == 99))
            .await;
    }
    sleep(Etcd::BEYOND).await;
    for (view, shrunk) in views.iter().zip(shrunk) {
        assert_eq!(ids(&view.borrow()), ["m0", "m1", "m2"]);
        assert!(!shrunk.is_finished(), "{}", shrunk.await.unwrap());
    }
}

/// A frozen server accepts connections and requests, and answers none.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_server_is_passed_by() {
    let cluster = EtcdCluster::start(3);
    let clients: Vec<_> = (0..9).map(|_| client(&cluster)).collect();
    let members: Vec<_> =
        clients.iter().enumerate().map(|(n, client)| client.join(member(&format!("m{n}")))).collect();
    for registration in &members {
        joined(registration).await;
    }
    let mut views: Vec<_> = clients.iter().map(|client| client.watch()).collect();
    for view in &mut views {
        until(view, MARGIN, "all there", |view| view.members.len() == 9).await;
    }
    let shrunk = tokio::spawn(shrinks(clients[8].watch()));
    let frozen = (cluster.elected() + 1) % 3;
    cluster.freeze(frozen);
    for running in 1..=8 {
        members.iter().for_each(|registration| set_running(registration, running));
        sleep(Duration::from_millis(250)).await;
    }
    let last = |view: &View| {
        let running = |m: &proto::Member| m.load.is_some_and(|load| load.running == 8);
        view.members.len() == 9 && view.members.iter().all(running)
    };
    for view in &mut views {
        until(view, MARGIN * 2, "the last update everywhere", last).await;
    }
    cluster.thaw(frozen);
    sleep(Etcd::BEYOND).await;
    for view in &views {
        assert!(last(&view.borrow()), "{:?}", view.borrow());
    }
    assert!(!shrunk.is_finished(), "{}", shrunk.await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_deleted_by_hand_and_a_revoked_lease_are_put_right() {
    let cluster = EtcdCluster::start(1);
    let client = client(&cluster);
    let registration = client.join(member("one"));
    joined(&registration).await;
    let mut view = client.watch();
    let is_there = |view: &View| ids(view) == ["one"];
    until(&mut view, MARGIN, "there", is_there).await;
    let mut etcd = etcd_client::Client::connect(cluster.endpoints(), None).await.unwrap();

    let key = "/contract/members/one";
    let lease = etcd.get(key, None).await.unwrap().kvs()[0].lease();
    etcd.delete(key, None).await.unwrap();
    until(&mut view, MARGIN, "deleted", |view| view.members.is_empty()).await;
    until(&mut view, Etcd::LEASE + MARGIN, "there again", is_there).await;

    etcd.lease_revoke(lease).await.unwrap();
    until(&mut view, MARGIN, "revoked", |view| view.members.is_empty()).await;
    until(&mut view, Etcd::LEASE + MARGIN, "there again", is_there).await;

    // What is not a member is not taken for one.
    etcd.put("/contract/members/two", "nonsense", None).await.unwrap();
    etcd.put("/contract/other", "x", None).await.unwrap();
    registration.update(|member| member.draining = true);
    until(&mut view, MARGIN, "draining", |view| view.members[0].draining).await;
    assert_eq!(ids(&view.borrow()), ["one"]);
}
