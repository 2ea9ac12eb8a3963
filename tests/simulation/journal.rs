//! What happened in a simulation, in order: all of it in one hash, so that two runs can be compared, and the
//! part that a reader wants as lines.

use crate::nature;
use kv::Digest;
use std::{
    fmt::Display,
    sync::{Arc, Mutex, PoisonError},
};

#[derive(Clone, Default)]
pub struct Journal(Arc<Mutex<Pages>>);

#[derive(Default)]
struct Pages {
    hash: u64,
    events: u64,
    aloud: bool,
}

impl Journal {
    /// `aloud`: lines go to stderr as they come.
    pub fn new(aloud: bool) -> Self {
        Journal(Arc::new(Mutex::new(Pages { aloud, ..Pages::default() })))
    }

    pub fn arrived(&self, from: &str, to: &str, bytes: &[u8]) {
        self.add(&format!("{from}>{to} {} {:x}", bytes.len(), Digest::of(bytes).0));
    }

    pub fn note(&self, who: &str, what: impl Display) {
        let line = format!("{who}: {what}");
        if self.add(&line) {
            eprintln!("{:>10.3} {line}", nature::now() as f64 / 1e9);
        }
    }

    /// Of everything so far.
    pub fn hash(&self) -> (u64, u64) {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (pages.hash, pages.events)
    }

    fn add(&self, event: &str) -> bool {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.events += 1;
        pages.hash = nature::mix(pages.hash ^ nature::mix(nature::now()) ^ Digest::of(event.as_bytes()).0);
        pages.aloud
    }
}
