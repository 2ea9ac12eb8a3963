//! The waiting requests, as a pure bounded queue. Order: priority class, raised by one level for each
//! `ageing` that the oldest of the class has waited, so that no class starves; inside a class the tenant
//! that has had least, counted in uncached prompt tokens; inside a tenant by arrival. Knows no clock, no
//! members, no sockets.
//!
//! A class ages as a whole and not request by request: otherwise the old requests of a tenant that floods
//! the queue would overtake the fresh ones of its neighbours, and the fair shares would be gone. Shares are
//! of a class: what a tenant has had of one says nothing about who waited longest for another.
//!
//! Room is shared, too. In a full queue a newcomer takes the place of the last request of the tenant that has
//! most waiting, if its own tenant will still have fewer than that one: nobody can fill the queue for all
//! others. One more that would only make the newcomer's the larger of the two is refused: whoever waits would
//! go for whoever comes, and back. What is under trial or was placed before loses no place.

use crate::shares::{Charge, Shares};
use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::Duration,
};
use tokio::time::Instant;

pub type Id = u64;

/// Departures over which the rate is measured.
const RATE_WINDOW: usize = 32;

#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub limit: usize,
    pub ageing: Duration,
}

/// Where a request stands in the order.
#[derive(Clone, Debug)]
pub struct Place {
    pub tenant: String,
    /// Lower first.
    pub priority: i32,
    /// Since when it waits.
    pub arrival: Instant,
    /// Was placed before: goes first in its class, for nothing, and is never refused for want of room.
    pub resumed: bool,
}

/// A request has joined, perhaps in the place of another, which is to be told that there was no room.
#[derive(Debug)]
pub struct Joined<T> {
    pub id: Id,
    pub displaced: Option<(T, Full)>,
}

/// The queue has no room.
#[derive(Clone, Debug, PartialEq)]
pub struct Full {
    pub limit: usize,
    /// At the rate of the last departures; unknown before there were any.
    pub predicted_wait: Option<Duration>,
}

struct Entry<T> {
    place: Place,
    /// What its offer has cost; `None` while it waits.
    offered: Option<Charge>,
    item: T,
}

pub struct Queue<T> {
    bounds: Bounds,
    entries: HashMap<Id, Entry<T>>,
    next: Id,
    /// By priority class.
    shares: HashMap<i32, Shares>,
    departures: VecDeque<Instant>,
}

impl<T> Queue<T> {
    pub fn new(bounds: Bounds) -> Self {
        Queue {
            bounds,
            entries: HashMap::new(),
            next: 0,
            shares: HashMap::new(),
            departures: VecDeque::new(),
        }
    }

    pub fn push(&mut self, place: Place, item: T) -> Result<Joined<T>, Full> {
        if self.entries.is_empty() {
            self.departures.clear();
        }
        let displaced = self.make_room(&place)?;
        self.shares.entry(place.priority).or_default().join(&place.tenant);
        self.next += 1;
        self.entries.insert(self.next, Entry { place, offered: None, item });
        Ok(Joined { id: self.next, displaced })
    }

    /// Of a full queue refuses the newcomer or, if its tenant has less of the queue, another in its stead.
    fn make_room(&mut self, newcomer: &Place) -> Result<Option<(T, Full)>, Full> {
        if self.entries.len() < self.bounds.limit || newcomer.resumed {
            return Ok(None);
        }
        let predicted_wait = self.predicted_wait(newcomer.arrival);
        let full = Full { limit: self.bounds.limit, predicted_wait };
        let last = self.last_of_largest(newcomer).ok_or(full.clone())?;
        Ok(self.entries.remove(&last).map(|entry| (entry.item, full)))
    }

    /// The last waiting request of the tenant that has most, if that is still more than the newcomer's
    /// tenant will have.
    fn last_of_largest(&self, newcomer: &Place) -> Option<Id> {
        let waiting = || self.waiting().filter(|(_, entry)| !entry.place.resumed);
        let mut held: HashMap<&str, usize> = HashMap::new();
        for (_, entry) in waiting() {
            *held.entry(&entry.place.tenant).or_default() += 1;
        }
        let levels = self.levels(newcomer.arrival);
        let order = |(id, entry): &(Id, &Entry<T>)| {
            (held[entry.place.tenant.as_str()], self.order(*id, &entry.place, &levels))
        };
        let (last, entry) = waiting().max_by_key(order)?;
        let own = held.get(newcomer.tenant.as_str()).copied().unwrap_or(0);
        (own + 1 < held[entry.place.tenant.as_str()]).then_some(last)
    }

    /// The first of the waiting requests that `eligible` accepts.
    pub fn first(&self, now: Instant, eligible: impl Fn(Id, &T) -> bool) -> Option<(Id, &T)> {
        let levels = self.levels(now);
        let eligible = self.waiting().filter(|(id, entry)| eligible(*id, &entry.item));
        let (id, entry) = eligible.min_by_key(|(id, entry)| self.order(*id, &entry.place, &levels))?;
        Some((id, &entry.item))
    }

    fn waiting(&self) -> impl Iterator<Item = (Id, &Entry<T>)> {
        self.entries.iter().map(|(id, entry)| (*id, entry)).filter(|(_, entry)| entry.offered.is_none())
    }

    /// Lower goes first.
    fn order(&self, id: Id, place: &Place, levels: &HashMap<i32, i64>) -> impl Ord + use<T> {
        let account = self.shares.get(&place.priority).map_or(0, |shares| shares.account(&place.tenant));
        (levels[&place.priority], place.priority, !place.resumed, account, place.arrival, id)
    }

    /// Takes a request out of the order while a placement is tried, and charges its tenant `cost` uncached
    /// prompt tokens. It keeps its place until [`Queue::admit`] or [`Queue::put_back`].
    pub fn offer(&mut self, id: Id, cost: u64) -> Option<&mut T> {
        let competing = self.tenants(self.entries.get(&id)?.place.priority);
        let entry = self.entries.get_mut(&id)?;
        let Place { tenant, priority, resumed, .. } = &entry.place;
        let shares = self.shares.entry(*priority).or_default();
        let charge = if *resumed { Charge::default() } else { shares.charge(tenant, cost, competing) };
        entry.offered = Some(charge);
        Some(&mut entry.item)
    }

    /// The placement was refused: back to where it was, the charge returned.
    pub fn put_back(&mut self, id: Id, item: T) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.item = item;
        let (place, charge) = (entry.place.clone(), entry.offered.take());
        self.refund(&place, charge);
    }

    /// The request is placed and leaves.
    pub fn admit(&mut self, id: Id, now: Instant) {
        if self.entries.remove(&id).is_none() {
            return;
        }
        self.forget_accounts();
        self.departures.push_back(now);
        if self.departures.len() > RATE_WINDOW {
            self.departures.pop_front();
        }
    }

    /// The request has ended unplaced, and leaves; what an offer under trial has cost is returned.
    pub fn remove(&mut self, id: Id) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.refund(&entry.place, entry.offered);
        self.forget_accounts();
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Requests waiting by priority class.
    pub fn depths(&self) -> BTreeMap<i32, u32> {
        let mut depths = BTreeMap::new();
        for entry in self.entries.values() {
            *depths.entry(entry.place.priority).or_default() += 1;
        }
        depths
    }

    /// How long the last in the queue will wait, if departures go on as they were; when the next is overdue
    /// already, at the rate that is left.
    fn predicted_wait(&self, now: Instant) -> Option<Duration> {
        let (first, last) = (*self.departures.front()?, *self.departures.back()?);
        let gaps = u32::try_from(self.departures.len() - 1).ok().filter(|gaps| *gaps > 0)?;
        let usual = last.duration_since(first) / gaps;
        let with_this = now.saturating_duration_since(first) / (gaps + 1);
        let waiting = u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        Some(usual.max(with_this).saturating_mul(waiting))
    }

    /// Level of each class: its priority, less one for each `ageing` that its oldest has waited.
    fn levels(&self, now: Instant) -> HashMap<i32, i64> {
        let mut oldest: HashMap<i32, Instant> = HashMap::new();
        for (_, entry) in self.waiting() {
            let arrival = oldest.entry(entry.place.priority).or_insert(entry.place.arrival);
            *arrival = entry.place.arrival.min(*arrival);
        }
        let ageing = self.bounds.ageing.as_nanos().max(1);
        let level = |(priority, arrival): (i32, Instant)| {
            let raised = now.saturating_duration_since(arrival).as_nanos() / ageing;
            (priority, i64::from(priority) - i64::try_from(raised).unwrap_or(i64::MAX / 2))
        };
        oldest.into_iter().map(level).collect()
    }

    /// How many compete for the service of a class.
    fn tenants(&self, priority: i32) -> usize {
        let waiting = self.waiting().filter(|(_, entry)| entry.place.priority == priority);
        waiting.map(|(_, entry)| entry.place.tenant.as_str()).collect::<HashSet<_>>().len()
    }

    fn refund(&mut self, place: &Place, charge: Option<Charge>) {
        if let (Some(charge), Some(shares)) = (charge, self.shares.get_mut(&place.priority)) {
            shares.refund(&place.tenant, charge);
        }
    }

    /// Keeps the accounts bounded: those that a returning tenant would be lifted above anyway go first.
    fn forget_accounts(&mut self) {
        for all in [false, true] {
            if self.accounts() > 4 * self.bounds.limit {
                self.forget_absent(all);
            }
        }
    }

    fn accounts(&self) -> usize {
        self.shares.values().map(Shares::len).sum()
    }

    fn forget_absent(&mut self, all: bool) {
        let places = self.entries.values().map(|entry| &entry.place);
        let present: HashSet<_> = places.map(|place| (place.priority, place.tenant.as_str())).collect();
        self.shares.retain(|priority, shares| {
            shares.forget(all, |tenant| present.contains(&(*priority, tenant)));
            shares.len() > 0
        });
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
