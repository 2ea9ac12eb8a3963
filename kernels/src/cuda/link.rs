//! The rate of the link between host and GPU, for comparison: copies between pinned memory and the device, nothing else running.

use super::{
    device::{Device, device},
    host::{Pinned, copy_down, copy_up},
};
use crate::Error;
use std::time::Instant;

/// Gigabytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkRates {
    /// From the device.
    pub down: f64,
    /// To the device.
    pub up: f64,
}

const COPIES: usize = 32;

/// Of copies of `bytes` each, one behind the other.
pub fn link_rates(ordinal: usize, bytes: usize) -> Result<LinkRates, Error> {
    let of = Device::new(ordinal)?;
    let (memory, mut pinned) = (of.alloc(bytes)?, Pinned::new(&of.context, bytes)?);
    let mut rate = |up: bool| {
        let began = Instant::now();
        for _ in 0..COPIES {
            match up {
                true => copy_up(&of.stream, memory.address(), pinned.bytes())?,
                false => copy_down(&of.stream, memory.address(), pinned.bytes_mut())?,
            }
        }
        of.stream.synchronize().map_err(device)?;
        Ok::<_, Error>((COPIES * bytes) as f64 / 1e9 / began.elapsed().as_secs_f64())
    };
    // The first copies pay for what the driver sets up.
    rate(true)?;
    Ok(LinkRates { up: rate(true)?, down: rate(false)? })
}
