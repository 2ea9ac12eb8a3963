//! Files that are read again when they change. A mounted Secret changes by a swap of symbolic links, which no watch of the
//! file itself would see; so they are read at a steady pace, and compared by content. What cannot be used is said and
//! counted, and what was there before stays in use.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};
use telemetry::credentials::Metrics;
use tokio::time::{MissedTickBehavior, interval};

/// Of the files, in the order in which they were named.
pub type Contents = Vec<Vec<u8>>;

/// Between looks.
const PACE: Duration = Duration::from_secs(2);
/// Nobody's secrets are larger; what is, is no such file.
const MOST_BYTES: u64 = 8 << 20;

/// All of them, or what is wrong with one.
pub fn read(paths: &[PathBuf]) -> Result<Contents, String> {
    paths.iter().map(|path| one(path).map_err(|error| format!("{}: {error}", path.display()))).collect()
}

fn one(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(io::Error::other(format!("larger than {MOST_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Hands every change from `known` on to `take`, until it is taken. Never ends. `what` names the files to people and metrics.
pub async fn follow(
    what: &'static str,
    paths: Vec<PathBuf>,
    mut known: Contents,
    metrics: Metrics,
    mut take: impl FnMut(&Contents) -> Result<(), String>,
) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut unreadable, mut refused) = (None, None);
    loop {
        pace.tick().await;
        let looked = paths.clone();
        let found = tokio::task::spawn_blocking(move || read(&looked)).await;
        match found.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(now) if now == known && refused.is_none() => {
                if unreadable.take().is_some() {
                    metrics.readable(what);
                }
            }
            Ok(now) => {
                unreadable = None;
                match take(&now) {
                    Ok(()) => {
                        tell(what, &metrics, Ok(()));
                        (known, refused) = (now, None);
                    }
                    // Tried again, and said once: a certificate may begin to be valid in a moment.
                    Err(_) if refused.as_ref() == Some(&now) => {}
                    Err(problem) => {
                        tell(what, &metrics, Err(problem));
                        refused = Some(now);
                    }
                }
            }
            Err(problem) if unreadable.as_ref() == Some(&problem) => {}
            Err(problem) => {
                tell(what, &metrics, Err(problem.clone()));
                unreadable = Some(problem);
            }
        }
    }
}

fn tell(what: &'static str, metrics: &Metrics, outcome: Result<(), String>) {
    match outcome {
        Ok(()) => {
            tracing::info!(what, "read again after a change, and in use");
            metrics.taken(what);
        }
        Err(problem) => {
            tracing::error!(what, %problem, "cannot be used after a change; what was there before stays in use");
            metrics.refused(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink, sync::mpsc};
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn a_swap_of_links_is_seen_once_and_a_bad_file_is_reported() {
        let dir = tempfile::TempDir::new().unwrap();
        let (data, path) = (dir.path().join("data"), dir.path().join("keys"));
        for version in ["1", "2", "bad"] {
            fs::write(dir.path().join(version), version).unwrap();
        }
        let swap = |version: &str| {
            let _ = fs::remove_file(&data);
            symlink(dir.path().join(version), &data).unwrap();
        };
        swap("1");
        symlink(&data, &path).unwrap();
        let (sender, seen) = mpsc::channel();
        let take = move |now: &Contents| {
            let text = String::from_utf8(now[0].clone()).unwrap();
            sender.send(text.clone()).unwrap();
            if text == "bad" { Err("bad".into()) } else { Ok(()) }
        };
        let metrics = Metrics::default();
        let known = read(std::slice::from_ref(&path)).unwrap();
        let task = tokio::spawn(follow("keys", vec![path.clone()], known, metrics.clone(), take));
        let mut told = Vec::new();
        for version in ["1", "2", "bad", "2"] {
            swap(version);
            sleep(3 * PACE).await;
            let mut handed: Vec<String> = seen.try_iter().collect();
            assert!(handed.len() <= 1 || version == "bad", "what was taken is not handed on again");
            handed.dedup();
            told.push(handed.concat());
            assert_eq!(metrics.is_stale("keys"), version == "bad", "{version}");
        }
        assert_eq!(told, ["", "2", "bad", "2"]);
        fs::remove_file(&data).unwrap();
        sleep(3 * PACE).await;
        assert!(metrics.is_stale("keys"), "absent");
        swap("2");
        sleep(3 * PACE).await;
        assert!(!metrics.is_stale("keys"), "back");
        assert_eq!(seen.try_iter().count(), 0);
        task.abort();
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = read(&[PathBuf::from("/absent/keys.toml")]).unwrap_err();
        assert!(error.contains("/absent/keys.toml"), "{error}");
        assert!(read(&[PathBuf::from("/dev/zero")]).unwrap_err().contains("larger"));
    }
}
