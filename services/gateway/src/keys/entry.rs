//! API keys and the file that lists them. A key is `sk-baton-<id>-<secret>`; the file has the id, which finds the entry, and a
//! salted hash of the secret, so that reading the file gives nobody a key.
//!
//! The secret is 256 random bits and no password: nobody can guess one, with or without a slow hash, so one round of
//! HMAC-SHA-256 under a salt of its own is enough, and a request is not made to wait for more. Comparing takes the same time
//! wherever the first difference lies.

use ring::{
    hmac::{self, HMAC_SHA256},
    rand::{SecureRandom, SystemRandom},
};
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;

const PREFIX: &str = "sk-baton-";
const SCHEME: &str = "hmac-sha256";
const ID_BYTES: usize = 6;
const SECRET_BYTES: usize = 32;
const SALT_BYTES: usize = 16;
/// Of one file.
const MOST_KEYS: usize = 10_000;
/// Longest name, and longest id.
const LONGEST: usize = 64;

/// One key, as it stands in the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The public part of the key.
    pub id: String,
    /// Whose key it is: the tenant. Keys of one name share one account, and must state the same limits.
    pub name: String,
    /// `hmac-sha256:SALT:TAG`, both hexadecimal.
    pub hash: String,
    #[serde(flatten)]
    pub limits: Limits,
    /// Opens what only operators may see.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub admin: bool,
}

/// What is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Of prompts and completions together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
    /// Requests at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// The lowest number, and so the highest priority, that a request may ask for; absent: the gateway's own bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority_min: Option<i32>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Entry>,
}

/// A key that has just been made. Nothing else knows the secret.
pub struct NewKey {
    pub key: String,
    pub entry: Entry,
}

impl NewKey {
    pub fn generate(name: &str, limits: Limits, admin: bool) -> Result<Self, String> {
        let (id, secret) = (hex(&random::<ID_BYTES>()?), hex(&random::<SECRET_BYTES>()?));
        let salt = random::<SALT_BYTES>()?;
        let tag = hmac::sign(&hmac::Key::new(HMAC_SHA256, &salt), secret.as_bytes());
        let hash = format!("{SCHEME}:{}:{}", hex(&salt), hex(tag.as_ref()));
        let key = format!("{PREFIX}{id}-{secret}");
        let entry = Entry { id, name: name.to_owned(), hash, limits, admin };
        entry.check()?;
        Ok(NewKey { key, entry })
    }
}

impl Entry {
    /// As it goes into the file.
    pub fn to_toml(&self) -> Result<String, String> {
        toml::to_string(&File { key: vec![self.clone()] }).map_err(|error| error.to_string())
    }

    /// Whether `secret` is this key's.
    pub fn matches(&self, secret: &str) -> bool {
        let Some((salt, tag)) = self.parts() else { return false };
        hmac::verify(&hmac::Key::new(HMAC_SHA256, &salt), secret.as_bytes(), &tag).is_ok()
    }

    fn parts(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let (salt, tag) = self.hash.strip_prefix(SCHEME)?.strip_prefix(':')?.split_once(':')?;
        Some((unhex(salt)?, unhex(tag)?)).filter(|(salt, tag)| salt.len() >= 8 && tag.len() == 32)
    }

    fn check(&self) -> Result<(), String> {
        let plain = |text: &str, extra: &[u8]| {
            (1..=LONGEST).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || extra.contains(&byte))
        };
        let named = |problem: &str| Err(format!("key {:?} of {:?}: {problem}", self.id, self.name));
        let limits = &self.limits;
        let zero =
            [limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency].contains(&Some(0));
        if !plain(&self.id, b"") {
            return named("the id must be 1 to 64 letters and digits");
        }
        if !plain(&self.name, b"-_.") {
            return named("the name must be 1 to 64 letters, digits, '-', '_' or '.'");
        }
        if self.parts().is_none() {
            return named("the hash must be hmac-sha256:SALT:TAG; make the entry with `baton key new`");
        }
        if zero {
            return named(
                "a limit is 0, which would refuse everything; leave it out for no limit, or the entry for no key",
            );
        }
        Ok(())
    }
}

/// The entries of a file, by id.
pub fn parse(text: &[u8]) -> Result<HashMap<String, Entry>, String> {
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    let file: File = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    if file.key.len() > MOST_KEYS {
        return Err(format!("{} keys, but at most {MOST_KEYS} are taken", file.key.len()));
    }
    let mut limits: HashMap<&str, &Entry> = HashMap::new();
    let mut ids = HashSet::new();
    for entry in &file.key {
        entry.check()?;
        if !ids.insert(&entry.id) {
            return Err(format!("two keys have the id {:?}", entry.id));
        }
        let first = limits.entry(&entry.name).or_insert(entry);
        if first.limits != entry.limits {
            return Err(format!(
                "the keys {:?} and {:?} are both of {:?}, but state different limits; they share one account",
                first.id, entry.id, entry.name
            ));
        }
    }
    Ok(file.key.iter().map(|entry| (entry.id.clone(), entry.clone())).collect())
}

/// Id and secret of what a client has sent.
pub fn split(key: &str) -> Option<(&str, &str)> {
    key.strip_prefix(PREFIX)?.split_once('-')
}

fn random<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| "the system gives no random bytes".to_owned())?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.len().is_multiple_of(2).then(|| digits.chunks(2).map(pair).collect())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_is_known_by_its_entry_and_no_other_is() {
        let limits = Limits { tokens_per_minute: Some(100_000), priority_min: Some(-1), ..Limits::default() };
        let new = NewKey::generate("search", limits, true).unwrap();
        let other = NewKey::generate("search", limits, true).unwrap();
        let text = new.entry.to_toml().unwrap() + &other.entry.to_toml().unwrap();
        let entries = parse(text.as_bytes()).unwrap();
        let (id, secret) = split(&new.key).unwrap();
        assert_eq!(entries[id], new.entry);
        assert!(entries[id].matches(secret));
        assert!(!entries[id].matches(split(&other.key).unwrap().1));
        assert!(!entries[id].matches(""));
        assert!(!text.contains(secret));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let entry = NewKey::generate("a", Limits::default(), false).unwrap().entry;
        let of = |change: &dyn Fn(&mut Entry)| {
            let mut changed = entry.clone();
            change(&mut changed);
            changed.to_toml().unwrap()
        };
        let good = of(&|_| {});
        assert!(parse(b"").unwrap().is_empty());
        for (text, part) in [
            ("[[key]]\nid = 1".to_owned(), "id"),
            (format!("{good}speed = 1\n"), "speed"),
            (of(&|entry| entry.name = "a b".into()), "letters, digits"),
            (of(&|entry| entry.id = String::new()), "the id must"),
            (of(&|entry| entry.hash = "secret".into()), "baton key new"),
            (of(&|entry| entry.limits.concurrency = Some(0)), "a limit is 0"),
            (format!("{good}{good}"), "two keys have the id"),
            (
                good.clone() + &of(&|entry| (entry.id, entry.limits.concurrency) = ("b".into(), Some(1))),
                "different limits",
            ),
        ] {
            let error = parse(text.as_bytes()).expect_err(part);
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}
