//! The demo model, part of the binary, so that `baton up` works from any directory. Unpacked once to
//! the user's cache directory: written beside and renamed, so that it is whole or absent.

use anyhow::Context;
use std::{
    env, fs,
    path::{Path, PathBuf},
};
use twox_hash::XxHash3_64;

/// Name under which the demo model is served.
pub const NAME: &str = "baton-demo";

macro_rules! embed {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/demo/checkpoint/", $name)))),*]
    };
}

const FILES: &[(&str, &[u8])] = embed![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json"
];

/// The directory of the demo model, unpacked if it is not there yet.
pub fn directory() -> anyhow::Result<PathBuf> {
    let target = cache().join("baton").join(format!("demo-{:016x}", fingerprint()));
    if !is_whole(&target) {
        unpack(&target).with_context(|| {
            format!(
                "cannot unpack the demo model (20 MB) to {}; set XDG_CACHE_HOME to a directory that can be written, or give --model",
                target.display()
            )
        })?;
    }
    Ok(target)
}

fn cache() -> PathBuf {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(env::temp_dir)
}

/// Names what is embedded, so that another version of Baton unpacks elsewhere.
fn fingerprint() -> u64 {
    FILES.iter().fold(0, |hash, (_, bytes)| XxHash3_64::oneshot_with_seed(hash, bytes))
}

fn is_whole(directory: &Path) -> bool {
    let same = |(name, bytes): &(&str, &[u8])| {
        fs::metadata(directory.join(name)).is_ok_and(|found| found.len() == bytes.len() as u64)
    };
    FILES.iter().all(same)
}

fn unpack(target: &Path) -> anyhow::Result<()> {
    let beside = target.with_extension(std::process::id().to_string());
    let written = write_all(&beside).and_then(|()| put_in_place(&beside, target));
    if written.is_err() {
        let _ = fs::remove_dir_all(&beside);
    }
    written
}

fn write_all(directory: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    for (name, bytes) in FILES {
        fs::write(directory.join(name), bytes).with_context(|| name.to_string())?;
    }
    Ok(())
}

/// Another process may be unpacking too; whoever is second finds it done.
fn put_in_place(beside: &Path, target: &Path) -> anyhow::Result<()> {
    if fs::rename(beside, target).is_ok() {
        return Ok(());
    }
    if !is_whole(target) {
        fs::remove_dir_all(target)?;
        return Ok(fs::rename(beside, target)?);
    }
    Ok(fs::remove_dir_all(beside)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacking_mends_what_is_half_there() {
        let parent = env::temp_dir().join(format!("baton-demo-test-{}", std::process::id()));
        let target = parent.join("demo-x");
        fs::create_dir_all(&target).unwrap();
        fs::write(target.join("model.safetensors"), b"cut off").unwrap();
        assert!(!is_whole(&target));
        unpack(&target).unwrap();
        assert!(is_whole(&target));
        unpack(&target).unwrap();
        assert_eq!(fs::read_dir(&parent).unwrap().count(), 1, "nothing is left beside it");
        fs::remove_dir_all(&parent).unwrap();
    }
}
