//! Connections to workers: a few per address, opened when first used, kept alive by HTTP/2 pings, dropped
//! when the member has left. Streams that run on a dropped connection end in their own time.

use proto::Dial;
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tonic::transport::{Channel, Endpoint};

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub per_address: usize,
    pub connect: Duration,
    /// Pings are sent at half of this and must be answered within the other half.
    pub silence: Duration,
}

pub struct Channels {
    settings: Settings,
    dial: Dial,
    open: Mutex<HashMap<String, Vec<Channel>>>,
    turn: AtomicUsize,
}

impl Channels {
    pub fn new(settings: Settings, dial: Dial) -> Self {
        Channels { settings, dial, open: Mutex::default(), turn: AtomicUsize::new(0) }
    }

    /// One of the connections to `address`, in turn. Fails only if the address is no URL, or one that is not dialled here.
    pub fn get(&self, address: &str) -> Result<Channel, String> {
        let mut open = self.lock();
        if !open.contains_key(address) {
            let endpoint = self.endpoint(address)?;
            let channels =
                (0..self.settings.per_address.max(1)).map(|_| self.dial.channel(&endpoint)).collect();
            open.insert(address.to_owned(), channels);
        }
        let channels = &open[address];
        Ok(channels[self.turn.fetch_add(1, Ordering::Relaxed) % channels.len()].clone())
    }

    /// Drops the connections to all other addresses.
    pub fn retain(&self, addresses: &HashSet<&str>) {
        self.lock().retain(|address, _| addresses.contains(address.as_str()));
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, String> {
        let half = self.settings.silence / 2;
        let endpoint = self.dial.events(address)?;
        Ok(endpoint
            .connect_timeout(self.settings.connect)
            .http2_keep_alive_interval(half)
            .keep_alive_timeout(half)
            .keep_alive_while_idle(true))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Channel>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_are_shared_and_dropped_with_their_member() {
        let second = Duration::from_secs(1);
        let settings = Settings { per_address: 2, connect: second, silence: second };
        let channels = Channels::new(settings, Dial::default());
        for _ in 0..5 {
            channels.get("http://127.0.0.1:1").unwrap();
        }
        channels.get("http://127.0.0.1:2").unwrap();
        assert!(channels.get("not a url").is_err());
        assert_eq!(channels.lock()["http://127.0.0.1:1"].len(), 2);
        channels.retain(&HashSet::from(["http://127.0.0.1:2"]));
        assert_eq!(channels.lock().keys().collect::<Vec<_>>(), ["http://127.0.0.1:2"]);
    }
}
