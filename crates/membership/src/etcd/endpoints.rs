//! Fail-over between the endpoints of one etcd cluster. `etcd-client` can balance over several
//! endpoints, but gives a call to a dead one and does not try it elsewhere; so here is one client per
//! endpoint, and each call goes to the endpoint that answered last, then to the others.

use super::EtcdTls;
use crate::{Error, retry::random_below};
use etcd_client::{Client, ConnectOptions};
use std::{
    fmt,
    future::Future,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time;
use tonic::Code;

pub(crate) struct Endpoints {
    endpoints: Vec<Endpoint>,
    /// Index of the one that answered last.
    good: AtomicUsize,
    tls: Option<EtcdTls>,
    /// For one call on one endpoint, connecting included.
    timeout: Duration,
}

struct Endpoint {
    url: String,
    client: Mutex<Option<Client>>,
}

impl Endpoints {
    /// Calls are bounded so that all endpoints can be tried twice within one lease of `ttl`.
    /// The first is chosen at random, so that processes spread over the endpoints.
    pub fn new(urls: Vec<String>, tls: Option<EtcdTls>, ttl: Duration) -> Self {
        let share = ttl / (2 * urls.len().max(1) as u32);
        let endpoints: Vec<_> =
            urls.into_iter().map(|url| Endpoint { url, client: Mutex::default() }).collect();
        Self {
            good: AtomicUsize::new(random_below(endpoints.len())),
            tls,
            timeout: share.clamp(Duration::from_millis(200), Duration::from_secs(1)),
            endpoints,
        }
    }

    /// `request` may run on several endpoints, one after the other, and a try that timed out may still
    /// take effect: requests must bear that.
    pub async fn call<T, F>(&self, request: impl Fn(Client) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let first = self.good.load(Relaxed);
        let mut last = Error::Ended;
        for turn in 0..self.endpoints.len() {
            let at = (first + turn) % self.endpoints.len();
            match self.try_at(&self.endpoints[at], &request).await {
                Err(error) if may_succeed_elsewhere(&error) => last = error,
                answer => {
                    self.good.store(at, Relaxed);
                    return answer;
                }
            }
        }
        Err(last)
    }

    async fn try_at<T, F>(&self, endpoint: &Endpoint, request: &impl Fn(Client) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let attempt = async { Ok(request(self.client(endpoint).await?).await?) };
        let answer = time::timeout(self.timeout, attempt).await.unwrap_or(Err(Error::Silent(self.timeout)));
        if answer.as_ref().is_err_and(may_succeed_elsewhere) {
            endpoint.forget();
        }
        answer
    }

    /// Connects with the first call.
    async fn client(&self, endpoint: &Endpoint) -> Result<Client, Error> {
        if let Some(client) = endpoint.slot().clone() {
            return Ok(client);
        }
        // An endpoint cut off from its cluster must not pretend to watch.
        let mut options = ConnectOptions::new().with_connect_timeout(self.timeout).with_require_leader(true);
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.read()?);
        }
        let client = Client::connect([&endpoint.url], Some(options)).await?;
        Ok(endpoint.slot().insert(client).clone())
    }
}

impl Endpoint {
    /// The connection swallows requests, or is refused for its certificate, which may have been renewed since: the next call
    /// opens a new one.
    fn forget(&self) {
        self.slot().take();
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let urls: Vec<_> = self.endpoints.iter().map(|at| at.url.as_str()).collect();
        f.write_str(&urls.join(","))
    }
}

/// False for what etcd itself decided; the same question elsewhere gets the same answer.
fn may_succeed_elsewhere(error: &Error) -> bool {
    use Code::*;
    match error {
        Error::Etcd(etcd_client::Error::GRpcStatus(status)) => {
            matches!(status.code(), Unavailable | DeadlineExceeded | Unknown | Internal | Cancelled | Aborted)
        }
        Error::Etcd(etcd_client::Error::LeaseKeepAliveError(_)) => false,
        _ => true,
    }
}
