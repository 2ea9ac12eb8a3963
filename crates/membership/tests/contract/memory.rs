//! The source inside one process.

use crate::suite::Source;
use membership::{Membership, Memory};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

pub struct InProcess {
    source: Memory,
    clients: AtomicU32,
}

impl InProcess {
    pub fn start() -> Self {
        InProcess { source: Memory::new(Self::LEASE), clients: AtomicU32::new(0) }
    }
}

impl Source for InProcess {
    const LEASE: Duration = Duration::from_secs(3);

    fn client(&self) -> Arc<dyn Membership> {
        let number = self.clients.fetch_add(1, Ordering::Relaxed);
        self.source.client(&number.to_string(), Duration::from_millis(5))
    }

    fn stop(&mut self) {
        self.source.stop();
    }

    fn start_again(&mut self) {
        self.source.start();
    }
}
