//! What one tenant has taken of what it may: requests and tokens a minute, and requests at the same time. A request is
//! charged when it comes; its tokens when its prompt has been counted, with all that it may generate; and when it ends, the
//! charge becomes what was used. So nobody can promise himself more than his share, and nobody pays for what he did not get.

use super::Limits;
use super::bucket::Bucket;
use openai::{Code, Error};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

#[derive(Debug)]
pub struct Account {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    concurrency: Option<u32>,
    running: u32,
}

/// A request's claim on its tenant's account. Dropping it ends the request, and makes the charge what was used.
#[derive(Debug)]
pub struct Lease {
    account: Arc<Account>,
    /// Tokens.
    charged: AtomicU64,
    used: AtomicU64,
}

/// Where a tenant stands, for the headers of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Standing {
    pub requests: Option<Left>,
    pub tokens: Option<Left>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Left {
    pub limit: u32,
    pub remaining: u64,
    /// Until all of it is there again.
    pub reset: Duration,
}

impl Account {
    pub fn new(limits: &Limits) -> Arc<Self> {
        let state = State { requests: None, tokens: None, concurrency: None, running: 0 };
        let account = Account { state: Mutex::new(state) };
        account.limit(limits);
        Arc::new(account)
    }

    /// Takes new limits up; what has been taken stays taken.
    pub fn limit(&self, limits: &Limits) {
        let (now, mut state) = (Instant::now(), self.lock());
        resize(&mut state.requests, limits.requests_per_minute, now);
        resize(&mut state.tokens, limits.tokens_per_minute, now);
        state.concurrency = limits.concurrency;
    }

    /// One request more, or the reason why not. `patience`: what to say when only the end of another request can help.
    /// Who has no token left is refused here, before anything of the request is read: no request takes none.
    pub fn admit(self: &Arc<Self>, patience: Duration) -> Result<Lease, Error> {
        let (now, mut state) = (Instant::now(), self.lock());
        if let Some(limit) = state.concurrency.filter(|limit| state.running >= *limit) {
            let message =
                format!("Concurrency limit reached for this API key: {limit} requests at the same time.");
            return Err(Error::new(Code::Concurrency, message).retry_after(patience));
        }
        if let Some(bucket) = &mut state.tokens {
            let limit = bucket.per_minute();
            bucket.holds(1, now).map_err(|wait| {
                let problem = format!("{limit} tokens a minute, none left");
                refused(Code::TokenRate, &problem, wait)
            })?;
        }
        if let Some(bucket) = &mut state.requests {
            let limit = bucket.per_minute();
            bucket.take(1, now).map_err(|wait| {
                let problem = format!("{limit} requests a minute");
                refused(Code::RequestRate, &problem, wait)
            })?;
        }
        state.running += 1;
        Ok(Lease { account: self.clone(), charged: AtomicU64::new(0), used: AtomicU64::new(0) })
    }

    pub fn standing(&self) -> Standing {
        let (now, state) = (Instant::now(), self.lock());
        let left = |bucket: &Bucket| Left {
            limit: bucket.per_minute(),
            remaining: bucket.remaining(now),
            reset: bucket.reset(now),
        };
        Standing { requests: state.requests.as_ref().map(left), tokens: state.tokens.as_ref().map(left) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Once: the tokens that the request may take.
    pub fn charge(&self, tokens: u64) -> Result<(), Error> {
        let (now, mut state) = (Instant::now(), self.account.lock());
        let Some(bucket) = &mut state.tokens else { return Ok(()) };
        let limit = bucket.per_minute();
        let taken = bucket.take(tokens, now).map_err(|wait| {
            let problem = format!("{limit} tokens a minute, {tokens} requested");
            refused(Code::TokenRate, &problem, wait)
        })?;
        self.charged.store(taken, Ordering::Relaxed);
        Ok(())
    }

    /// The tokens that it has taken, so far.
    pub fn used(&self, tokens: u64) {
        self.used.store(tokens, Ordering::Relaxed);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (now, mut state) = (Instant::now(), self.account.lock());
        state.running -= 1;
        let (charged, used) = (self.charged.load(Ordering::Relaxed), self.used.load(Ordering::Relaxed));
        if let Some(bucket) = &mut state.tokens {
            bucket.settle(charged, used, now);
        }
    }
}

fn resize(bucket: &mut Option<Bucket>, limit: Option<u32>, now: Instant) {
    match (bucket.as_mut(), limit) {
        (Some(bucket), Some(limit)) => bucket.resize(limit, now),
        (_, limit) => *bucket = limit.map(|limit| Bucket::new(limit, now)),
    }
}

fn refused(code: Code, limit: &str, wait: Duration) -> Error {
    let seconds = wait.as_nanos().div_ceil(1_000_000) as f64 / 1000.0;
    let message = format!("Rate limit reached for this API key: {limit}. Please try again in {seconds} s.");
    Error::new(code, message).retry_after(wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const PATIENCE: Duration = Duration::from_secs(1);

    fn account(requests: u32, tokens: u32, concurrency: u32) -> Arc<Account> {
        Account::new(&Limits {
            requests_per_minute: Some(requests),
            tokens_per_minute: Some(tokens),
            concurrency: Some(concurrency),
            ..Limits::default()
        })
    }

    fn remaining(account: &Account) -> (u64, u64) {
        let standing = account.standing();
        (standing.requests.unwrap().remaining, standing.tokens.unwrap().remaining)
    }

    #[tokio::test(start_paused = true)]
    async fn each_limit_holds_to_the_request_and_says_when_to_come_back() {
        let account = account(3, 1000, 2);
        let first = account.admit(PATIENCE).unwrap();
        let second = account.admit(PATIENCE).unwrap();
        assert_eq!(account.admit(PATIENCE).unwrap_err().code, Code::Concurrency);
        drop(second);
        drop(account.admit(PATIENCE).unwrap());
        let error = account.admit(PATIENCE).unwrap_err();
        assert_eq!((error.code, error.retry_after), (Code::RequestRate, Some(Duration::from_secs(20))));
        first.charge(900).unwrap();
        advance(Duration::from_secs(20)).await;
        let fourth = account.admit(PATIENCE).unwrap();
        // 100, and a third of a minute's since.
        let error = fourth.charge(500).unwrap_err();
        assert_eq!((error.code, error.retry_after), (Code::TokenRate, Some(Duration::from_secs(4))));
        advance(Duration::from_secs(4)).await;
        fourth.charge(500).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_token_nobody_gets_in_and_no_request_is_charged() {
        let account = account(10, 60, 3);
        let lease = account.admit(PATIENCE).unwrap();
        lease.charge(60).unwrap();
        advance(Duration::from_millis(400)).await;
        let error = account.admit(PATIENCE).unwrap_err();
        assert_eq!((error.code, error.retry_after), (Code::TokenRate, Some(Duration::from_millis(600))));
        assert_eq!(remaining(&account), (9, 0));
        advance(Duration::from_millis(600)).await;
        account.admit(PATIENCE).unwrap().charge(1).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_makes_the_charge_what_was_used() {
        let account = account(10, 1000, 2);
        let lease = account.admit(PATIENCE).unwrap();
        lease.charge(700).unwrap();
        assert_eq!(remaining(&account), (9, 300));
        lease.used(120);
        drop(lease);
        assert_eq!(remaining(&account), (9, 880));
        let lease = account.admit(PATIENCE).unwrap();
        lease.charge(5000).expect_err("needs a full bucket");
        drop(lease);
        assert_eq!(remaining(&account), (8, 880), "what was refused costs no tokens");
        advance(Duration::from_secs(60)).await;
        let lease = account.admit(PATIENCE).unwrap();
        lease.charge(5000).unwrap();
        lease.used(1500);
        drop(lease);
        assert_eq!(remaining(&account), (9, 0));
        assert_eq!(account.standing().tokens.unwrap().reset, Duration::from_secs(90), "500 are owed");
    }

    #[tokio::test(start_paused = true)]
    async fn new_limits_forget_nothing() {
        let account = account(10, 1000, 1);
        let lease = account.admit(PATIENCE).unwrap();
        lease.charge(600).unwrap();
        account.limit(&Limits { tokens_per_minute: Some(700), concurrency: Some(2), ..Limits::default() });
        assert_eq!(account.standing().requests, None);
        assert_eq!(account.standing().tokens.unwrap().remaining, 100);
        drop(account.admit(PATIENCE).expect("two at the same time now"));
        drop(lease);
        assert_eq!(account.standing().tokens.unwrap().remaining, 700);
    }
}
