//! A token in a file, which whoever wants something changed must bring. It is read anew for each question, of which there are
//! few: a token that was replaced is worth nothing at once.

use crate::watched;
use ring::{
    hmac::{self, HMAC_SHA256},
    rand::SystemRandom,
};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A shorter one could be guessed.
const SHORTEST: usize = 16;

/// Between complaints about a file that cannot be read: whoever can ask could fill the log.
const COMPLAIN: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub struct TokenFile {
    path: PathBuf,
    complained: Arc<Mutex<Option<Instant>>>,
}

/// Why somebody may not.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum Denied {
    #[error("this needs the admin token: Authorization: Bearer TOKEN")]
    Missing,
    #[error("this is not the admin token")]
    Wrong,
    /// Nobody may, until this is mended. Why is for the log: whoever asks need not know where what lies.
    #[error("nobody can be let in: the admin token cannot be read, and this service's log says why")]
    Unreadable,
}

impl TokenFile {
    /// There must be a token in it already.
    pub fn open(path: PathBuf) -> Result<Self, String> {
        let file = TokenFile { path, complained: Arc::default() };
        file.read()?;
        Ok(file)
    }

    /// The token, for whoever brings it.
    pub fn read(&self) -> Result<String, String> {
        let path = self.path.display();
        let bytes = watched::read(std::slice::from_ref(&self.path))?.concat();
        let text = String::from_utf8(bytes).map_err(|error| format!("{path}: {error}"))?;
        let token = text.trim();
        if token.len() < SHORTEST || token.contains(char::is_whitespace) {
            return Err(format!(
                "{path}: expected one token of at least {SHORTEST} characters, without spaces"
            ));
        }
        Ok(token.to_owned())
    }

    /// Whether an `authorization` header brings it. Who brings none has no file read.
    pub fn check(&self, authorization: Option<&str>) -> Result<(), Denied> {
        let given = bearer(authorization.unwrap_or_default()).ok_or(Denied::Missing)?;
        let token = self.read().map_err(|problem| self.unreadable(&problem))?;
        if equal(token.as_bytes(), given.as_bytes()) { Ok(()) } else { Err(Denied::Wrong) }
    }

    fn unreadable(&self, problem: &str) -> Denied {
        if self.may_complain(Instant::now()) {
            tracing::error!(%problem, "the admin token cannot be read; correct the file that `admin_token_file` names");
        }
        Denied::Unreadable
    }

    fn may_complain(&self, now: Instant) -> bool {
        let mut last = self.complained.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= COMPLAIN);
        if due {
            *last = Some(now);
        }
        due
    }
}

/// What stands behind `Bearer` in an `authorization` header.
pub fn bearer(header: &str) -> Option<&str> {
    let (scheme, token) = header.trim().split_once(' ')?;
    Some(token.trim()).filter(|token| scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
}

/// In a time that tells nothing of where they differ: their codes under a key of the moment are compared.
fn equal(one: &[u8], other: &[u8]) -> bool {
    let Ok(key) = hmac::Key::generate(HMAC_SHA256, &SystemRandom::new()) else { return false };
    hmac::verify(&key, other, hmac::sign(&key, one).as_ref()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn only_the_token_of_the_moment_opens() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("token");
        assert!(TokenFile::open(path.clone()).unwrap_err().contains("token"), "absent");
        fs::write(&path, "short").unwrap();
        assert!(TokenFile::open(path.clone()).unwrap_err().contains("at least 16"));
        fs::write(&path, "0123456789abcdef\n").unwrap();
        let file = TokenFile::open(path.clone()).unwrap();
        for good in ["Bearer 0123456789abcdef", "bearer  0123456789abcdef "] {
            assert_eq!(file.check(Some(good)), Ok(()));
        }
        for (bad, denied) in [
            (None, Denied::Missing),
            (Some("0123456789abcdef"), Denied::Missing),
            (Some("Bearer "), Denied::Missing),
            (Some("Bearer 0123456789abcdeF"), Denied::Wrong),
            (Some("Bearer 0123456789abcde"), Denied::Wrong),
        ] {
            assert_eq!(file.check(bad), Err(denied), "{bad:?}");
        }
        fs::write(&path, "fedcba9876543210").unwrap();
        assert_eq!(file.check(Some("Bearer 0123456789abcdef")), Err(Denied::Wrong));
        assert_eq!(file.check(Some("Bearer fedcba9876543210")), Ok(()));
        fs::remove_file(&path).unwrap();
        let denied = file.check(Some("Bearer fedcba9876543210")).unwrap_err();
        assert_eq!(denied, Denied::Unreadable);
        assert_eq!(file.check(None), Err(Denied::Missing), "not even looked for");
        let said = format!("{denied} {denied:?}");
        assert!(said.contains("log") && !said.contains(dir.path().to_str().unwrap()), "{said}");
    }

    #[test]
    fn an_unreadable_file_is_told_once_a_minute() {
        let file = TokenFile { path: PathBuf::new(), complained: Arc::default() };
        let now = Instant::now();
        let at = |seconds| file.clone().may_complain(now + Duration::from_secs(seconds));
        assert_eq!([0, 1, 59, 60, 61, 120].map(at), [true, false, false, true, false, true]);
    }
}
