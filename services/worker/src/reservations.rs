//! The reservations that delivery streams can find by their id. Bounded; an entry lives as long as the
//! guard that its owner holds.

use handoff::receive::Inbox;
use proto::{Error, ErrorCode};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

#[derive(Clone)]
pub struct Reservations {
    table: Arc<Mutex<HashMap<u64, Inbox>>>,
    limit: usize,
}

/// Keeps one reservation findable.
pub struct Entry {
    id: u64,
    table: Reservations,
}

impl Reservations {
    pub fn new(limit: usize) -> Self {
        Reservations { table: Arc::default(), limit }
    }

    /// Under a random id, so that a delivery meant for an earlier incarnation finds nothing.
    pub fn insert(&self, inbox: Inbox) -> Result<Entry, Error> {
        let mut table = self.lock();
        if table.len() >= self.limit {
            let message = format!("{} reservations are open, the most allowed", self.limit);
            return Err(Error::new(ErrorCode::NoCapacity, message));
        }
        let id =
            std::iter::repeat_with(random).find(|id| *id != 0 && !table.contains_key(id)).unwrap_or_default();
        table.insert(id, inbox);
        Ok(Entry { id, table: self.clone() })
    }

    pub fn get(&self, id: u64) -> Option<Inbox> {
        self.lock().get(&id).cloned()
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Inbox>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.table.lock().remove(&self.id);
    }
}

fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1.rotate_left(8) ^ uuid::Uuid::new_v4().as_u64_pair().0
}
