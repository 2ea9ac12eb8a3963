//! The keys that are known now, and the accounts of their tenants.

use super::account::{Account, Lease, Standing};
use super::entry::{self, Entry};
use crate::Error;
use credentials::{Metrics, bearer};
use openai::Code;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

/// As metrics have it.
const WHAT: &str = "keys";

pub struct KeyRing {
    path: PathBuf,
    first: credentials::Contents,
    keys: RwLock<Arc<Keys>>,
}

#[derive(Default)]
struct Keys {
    entries: HashMap<String, Entry>,
    /// By name.
    accounts: HashMap<String, Arc<Account>>,
}

/// Who asks, by the key that came with the request.
#[derive(Clone, Debug)]
pub struct Caller {
    pub tenant: String,
    pub admin: bool,
    /// The lowest number that it may ask for.
    pub priority_min: Option<i32>,
    account: Arc<Account>,
}

impl KeyRing {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let wrong = |problem: String| Error::Keys { path: path.to_owned(), problem };
        let first = credentials::read(&[path.to_owned()]).map_err(wrong)?;
        let ring = KeyRing { path: path.to_owned(), first, keys: RwLock::default() };
        ring.replace(&ring.first[0]).map_err(wrong)?;
        Ok(ring)
    }

    /// Takes changes of the file up, for ever.
    pub async fn follow(&self, metrics: &Metrics) {
        metrics.watch(WHAT);
        let take = |contents: &credentials::Contents| self.replace(&contents[0]);
        credentials::follow(WHAT, vec![self.path.clone()], self.first.clone(), metrics.clone(), take).await;
    }

    /// All keys at once, or none.
    fn replace(&self, text: &[u8]) -> Result<(), String> {
        let entries = entry::parse(text)?;
        // A file that is being written anew looks like this for a moment.
        if entries.is_empty() {
            return Err("there is no key in it; `baton key new NAME` makes an entry".into());
        }
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        // Of tenants that are not in the file now as well: their requests still run, and they may come back.
        let mut accounts = keys.accounts.clone();
        for Entry { name, limits, .. } in entries.values() {
            let account = accounts.entry(name.clone()).or_insert_with(|| Account::new(limits));
            account.limit(limits);
        }
        tracing::info!(keys = entries.len(), tenants = accounts.len(), "API keys");
        *keys = Arc::new(Keys { entries, accounts });
        Ok(())
    }

    /// The owner of the key in an `authorization` header.
    pub fn find(&self, authorization: Option<&str>) -> Result<Caller, openai::Error> {
        let key = authorization.and_then(bearer).ok_or_else(missing)?;
        let (id, secret) = entry::split(key).ok_or_else(|| unknown(""))?;
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        let entry = keys.entries.get(id).filter(|entry| entry.matches(secret)).ok_or_else(|| unknown(id))?;
        Ok(Caller {
            tenant: entry.name.clone(),
            admin: entry.admin,
            priority_min: entry.limits.priority_min,
            account: keys.accounts[&entry.name].clone(),
        })
    }
}

impl Caller {
    pub fn admit(&self, patience: Duration) -> Result<Lease, openai::Error> {
        self.account.admit(patience)
    }

    pub fn standing(&self) -> Standing {
        self.account.standing()
    }
}

fn missing() -> openai::Error {
    openai::Error::new(
        Code::InvalidKey,
        "You didn't provide an API key. Send it in an authorization header: Authorization: Bearer YOUR_KEY",
    )
}

/// Says the public part at most.
fn unknown(id: &str) -> openai::Error {
    let shown = if id.is_empty() {
        "it does not look like sk-baton-…".into()
    } else {
        format!("id {:?}", openai::shorten(id))
    };
    openai::Error::new(
        Code::InvalidKey,
        format!("Incorrect API key provided: {shown}. Ask the operator for a key."),
    )
}

#[cfg(test)]
mod tests {
    use super::super::{Limits, NewKey};
    use super::*;

    fn ring(text: &str) -> KeyRing {
        let ring = KeyRing { path: PathBuf::new(), first: Vec::new(), keys: RwLock::default() };
        ring.replace(text.as_bytes()).unwrap();
        ring
    }

    fn new(name: &str) -> NewKey {
        let limits = Limits { requests_per_minute: Some(2), ..Limits::default() };
        NewKey::generate(name, limits, false).unwrap()
    }

    #[test]
    fn a_key_names_its_tenant_and_everything_else_is_refused() {
        let (one, other) = (new("one"), new("other"));
        let ring = ring(&one.entry.to_toml().unwrap());
        for header in [format!("Bearer {}", one.key), format!("bearer  {} ", one.key)] {
            assert_eq!(ring.find(Some(&header)).unwrap().tenant, "one");
        }
        let mixed = format!("sk-baton-{}-{}", one.entry.id, entry::split(&other.key).unwrap().1);
        for header in ["", "Bearer", "Bearer ", &one.key, "Basic abc", "Bearer sk-abc"]
            .map(str::to_owned)
            .into_iter()
            .chain([&other.key, &mixed].map(|key| format!("Bearer {key}")))
        {
            let error = ring.find(Some(&header)).unwrap_err();
            assert_eq!(error.code, Code::InvalidKey, "{header}");
            assert!(!error.message.contains(entry::split(&other.key).unwrap().1), "{}", error.message);
        }
        assert!(ring.find(None).is_err());
    }

    #[test]
    fn a_change_keeps_accounts_and_a_bad_file_changes_nothing() {
        let (old, fresh) = (new("t"), new("t"));
        let ring = ring(&old.entry.to_toml().unwrap());
        let bearer = |key: &NewKey| format!("Bearer {}", key.key);
        let caller = ring.find(Some(&bearer(&old))).unwrap();
        drop(caller.admit(Duration::ZERO).unwrap());
        ring.replace(b"[[key]]").unwrap_err();
        ring.find(Some(&bearer(&old))).expect("still known");
        ring.replace(fresh.entry.to_toml().unwrap().as_bytes()).unwrap();
        ring.find(Some(&bearer(&old))).expect_err("gone from the file");
        let caller = ring.find(Some(&bearer(&fresh))).unwrap();
        drop(caller.admit(Duration::ZERO).unwrap());
        caller.admit(Duration::ZERO).expect_err("a new key brings no new account");
    }
}
