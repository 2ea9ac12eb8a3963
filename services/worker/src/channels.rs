//! Connections to decode workers, kept by address. A channel connects when first used and again after a
//! loss, so one failed delivery spoils nothing for the next.

use handoff::{Error, transport};
use proto::Dial;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};
use tonic::transport::Channel;

/// Addresses kept; beyond these the cache starts anew. Deliveries under way keep their own channel.
const MOST: usize = 1024;

pub struct Channels {
    dial: Dial,
    open: Mutex<HashMap<String, Channel>>,
}

impl Channels {
    pub fn new(dial: Dial) -> Self {
        Channels { dial, open: Mutex::default() }
    }

    pub fn dial(&self) -> Dial {
        self.dial.clone()
    }

    /// One that is not kept.
    pub fn once(&self, address: &str) -> Result<Channel, Error> {
        transport::channel(&self.dial, address)
    }

    pub fn get(&self, address: &str) -> Result<Channel, Error> {
        let mut channels = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        if channels.len() >= MOST {
            channels.clear();
        }
        let channel = transport::channel(&self.dial, address)?;
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}
