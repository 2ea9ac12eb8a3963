//! What operations compute on the way: named rooms of device memory, each at the largest size that it was asked for.
//! Sizes depend on the model's shape and never on a step, so that after one step nothing grows any more.

use super::{
    device::{Address, Device, Memory},
    graphs::Graphs,
};
use crate::Error;
use std::collections::HashMap;

#[derive(Default)]
pub struct Scratch {
    rooms: HashMap<&'static str, Memory>,
    /// No allocation is possible while a step is recorded.
    pub recording: bool,
}

impl Scratch {
    pub fn room(
        &mut self,
        device: &Device,
        graphs: &mut Graphs,
        name: &'static str,
        bytes: usize,
    ) -> Result<Address, Error> {
        if let Some(room) = self.rooms.get(name).filter(|room| room.bytes() >= bytes) {
            return Ok(room.address());
        }
        if self.recording {
            return Err(Error::Device(format!(
                "scratch {name} would grow to {bytes} bytes in a recorded step"
            )));
        }
        // The old room may be in use by what is enqueued, and its address may be recorded.
        device.synchronize()?;
        graphs.forget();
        self.rooms.remove(name);
        let room = device.alloc(bytes)?;
        let address = room.address();
        self.rooms.insert(name, room);
        Ok(address)
    }
}
