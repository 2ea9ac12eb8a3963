//! One number for "the same weights": workers exchange KV blocks only if it is equal.

use crate::{Directory, Error, check_directory, checkpoint::Checkpoint, directory::Weights};
use std::{hash::Hasher, path::Path};
use twox_hash::XxHash3_64;

/// Pieces of every tensor that are hashed, evenly spread, and the bytes of each. The whole of DeepSeek-V3 would take
/// minutes to read; checkpoints that differ only in bytes never looked at are not told apart.
const PIECES: usize = 4;
const PIECE_BYTES: usize = 64;

/// Covers the configuration that the model is computed by, and name, type, shape and sampled bytes of every tensor, or the seed of
/// random ones. Equal for equal weights, however they are split over files.
pub fn weights_fingerprint(dir: &Path) -> Result<u64, Error> {
    Ok(of_directory(&check_directory(dir)?))
}

pub(crate) fn of_directory(directory: &Directory) -> u64 {
    let mut hasher = XxHash3_64::new();
    hasher.write(format!("{:?}", directory.config).as_bytes());
    match &directory.weights {
        Weights::Files(checkpoint) => add_files(checkpoint, &mut hasher),
        Weights::Random(random) => hasher.write(format!("random {}", random.seed).as_bytes()),
    }
    hasher.finish()
}

fn add_files(checkpoint: &Checkpoint, hasher: &mut XxHash3_64) {
    for (name, entry) in checkpoint.iter() {
        hasher.write(format!("{name} {:?} {:?}", entry.dtype, entry.shape).as_bytes());
        sample(checkpoint.bytes(entry), hasher);
        checkpoint.forget(entry);
    }
}

fn sample(bytes: &[u8], hasher: &mut XxHash3_64) {
    if bytes.len() <= PIECES * PIECE_BYTES {
        return hasher.write(bytes);
    }
    let stride = (bytes.len() - PIECE_BYTES) / (PIECES - 1);
    for piece in 0..PIECES {
        hasher.write(&bytes[piece * stride..][..PIECE_BYTES]);
    }
}
