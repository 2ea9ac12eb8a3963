//! A source of membership inside one process, for simulated clusters: leases run out, the source can be away,
//! and one observer can be cut off from it while others are not. Keeps the same contract as etcd and the
//! registry; nothing survives the process.

use crate::{
    Error, Membership, Registration, View,
    registration::Presence,
    roster::{self, Roster},
};
use proto::Member;
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

/// The source. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Memory {
    lease: Duration,
    state: Arc<watch::Sender<State>>,
}

#[derive(Default)]
struct State {
    away: bool,
    /// Clients that do not reach it.
    cut: BTreeSet<String>,
    records: BTreeMap<String, Record>,
    /// As in [`View::left`].
    left: VecDeque<String>,
    /// The latest join with each id: it alone may write.
    holders: BTreeMap<String, u64>,
    joins: u64,
}

struct Record {
    member: Member,
    expires: Instant,
}

impl Memory {
    /// A member silent for longer than `lease` is gone.
    pub fn new(lease: Duration) -> Self {
        Memory { lease, state: Arc::default() }
    }

    /// Of the process called `name`. `lag`: how much later than they happen it hears of changes.
    pub fn client(&self, name: &str, lag: Duration) -> Arc<dyn Membership> {
        let (view, watcher) = (watch::Sender::default(), OnceLock::new());
        Arc::new(Client { source: self.clone(), name: name.to_owned(), lag, view, watcher })
    }

    /// Nobody reaches it, until [`Self::start`].
    pub fn stop(&self) {
        self.state.send_modify(|state| state.away = true);
    }

    /// It is back, with what it held: every lease begins anew.
    pub fn start(&self) {
        let expires = Instant::now() + self.lease;
        self.state.send_modify(|state| {
            state.away = false;
            state.records.values_mut().for_each(|record| record.expires = expires);
        });
    }

    /// Whether the process called `name` reaches it.
    pub fn connect(&self, name: &str, connected: bool) {
        self.state.send_modify(|state| match connected {
            true => drop(state.cut.remove(name)),
            false => drop(state.cut.insert(name.to_owned())),
        });
    }
}

impl State {
    fn reached_by(&self, name: &str) -> bool {
        !self.away && !self.cut.contains(name)
    }

    /// Who is here, and who has left.
    fn live(&self) -> (Vec<Member>, VecDeque<String>) {
        let now = Instant::now();
        let live = self.records.values().filter(|record| record.expires > now);
        (live.map(|record| record.member.clone()).collect(), self.left.clone())
    }

    fn next_expiry(&self) -> Option<Instant> {
        let now = Instant::now();
        self.records.values().map(|record| record.expires).filter(|expires| *expires > now).min()
    }
}

struct Client {
    source: Memory,
    name: String,
    lag: Duration,
    view: watch::Sender<View>,
    watcher: OnceLock<JoinHandle<()>>,
}

impl Membership for Client {
    fn join(&self, member: Member) -> Registration {
        let (source, name) = (self.source.clone(), self.name.clone());
        Registration::spawn(member, |presence| hold(source, name, presence))
    }

    fn watch(&self) -> watch::Receiver<View> {
        self.watcher.get_or_init(|| {
            let roster = Roster::new(self.view.clone());
            tokio::spawn(follow(self.source.clone(), self.name.clone(), self.lag, roster))
        });
        self.view.subscribe()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.watcher.take().inspect(JoinHandle::abort);
    }
}

/// Keeps a member there until its owner leaves.
async fn hold(source: Memory, name: String, mut presence: Presence) {
    let mut left = std::pin::pin!(presence.left());
    let mut renew = interval(source.lease / 3);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut changes, mut number) = (source.state.subscribe(), None);
    loop {
        let reached = changes.borrow_and_update().reached_by(&name);
        if reached {
            let member = presence.latest();
            let number = *number.get_or_insert_with(|| claim(&source, &member.id));
            if !put(&source, number, member) {
                return tracing::warn!(name, "{}", Error::Superseded);
            }
            presence.set_visible();
        }
        tokio::select! {
            () = &mut left => return leave(&source, &name, number, &presence.latest()),
            _ = renew.tick() => {}
            () = presence.changed(), if reached => {}
            () = reached_again(&mut changes, &name) => {}
        }
    }
}

/// Waits until the source can be reached after it could not.
async fn reached_again(changes: &mut watch::Receiver<State>, name: &str) {
    let _ = changes.wait_for(|state| !state.reached_by(name)).await;
    let _ = changes.wait_for(|state| state.reached_by(name)).await;
}

fn claim(source: &Memory, id: &str) -> u64 {
    let mut number = 0;
    source.state.send_if_modified(|state| {
        state.joins += 1;
        number = state.joins;
        state.holders.insert(id.to_owned(), number);
        false
    });
    number
}

/// Writes the record and renews its lease; false if a later join holds the id.
fn put(source: &Memory, number: u64, member: Member) -> bool {
    let mut mine = false;
    source.state.send_if_modified(|state| {
        mine = state.holders.get(&member.id) == Some(&number);
        mine && state.put(member, source.lease)
    });
    mine
}

impl State {
    /// Whether anybody but the owner of the lease sees a difference.
    fn put(&mut self, member: Member, lease: Duration) -> bool {
        let now = Instant::now();
        let before = self.records.get(&member.id);
        let changed = before.is_none_or(|record| record.member != member || record.expires <= now);
        self.records.insert(member.id.clone(), Record { member, expires: now + lease });
        changed
    }
}

/// `last` is its last record, by which others know how it left.
fn leave(source: &Memory, name: &str, number: Option<u64>, last: &Member) {
    source.state.send_if_modified(|state| {
        let mine = number.is_some() && state.holders.get(&last.id).copied() == number;
        let removed = mine && state.reached_by(name) && state.records.remove(&last.id).is_some();
        if removed {
            roster::note_gone(&mut state.left, last);
        }
        removed
    });
}

/// One observer's views, `lag` behind.
async fn follow(source: Memory, name: String, lag: Duration, mut roster: Roster) {
    let mut changes = source.state.subscribe();
    loop {
        if changes.wait_for(|state| state.reached_by(&name)).await.is_err() {
            return;
        }
        sleep(lag).await;
        let (members, left) = changes.borrow_and_update().live();
        roster.reconnected(members, left, source.lease);
        while changes.borrow().reached_by(&name) {
            let expiry = changes.borrow().next_expiry();
            tokio::select! {
                _ = changes.changed() => sleep(lag).await,
                () = at(expiry) => {}
                () = roster.expire() => {}
            }
            let state = changes.borrow_and_update();
            if state.reached_by(&name) {
                let (members, left) = state.live();
                roster.replace(members, left);
            }
        }
        roster.disconnected();
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
