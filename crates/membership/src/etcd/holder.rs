//! Holds one member's key in etcd: grants its lease, writes the record, renews, and begins anew when
//! the lease was lost. Writes are conditional on the key's revision, so that a delayed write (one that
//! timed out here but was still on its way) never overwrites a later one.

use super::endpoints::Endpoints;
use crate::{
    Error,
    registration::Presence,
    retry::{Backoff, Link},
};
use etcd_client::{Compare, CompareOp, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse};
use prost::Message as _;
use proto::Member;
use std::{pin::pin, sync::Arc, time::Duration};
use tokio::time::{self, Instant};
use tonic::Code;

/// Least time between two writes of one member: each costs the cluster a commit.
const PACE: Duration = Duration::from_millis(200);
/// Own leases remembered, to tell a key written under one of them from another owner's.
const LEASES: usize = 16;
/// For the last record of one who leaves: less than [`Registration::leave`](crate::Registration::leave) waits.
const LAST_RECORD: Duration = Duration::from_secs(1);
/// Conditional writes in a row before backing off.
const WRITES: usize = 4;

pub(crate) struct Holder {
    endpoints: Arc<Endpoints>,
    key: String,
    ttl: Duration,
    presence: Presence,
    lease: Option<Lease>,
    /// Ids of the last leases of this incarnation.
    own: Vec<i64>,
    /// The key's revision as last written by us; 0: absent.
    revision: i64,
    /// What the key is known to hold.
    written: Option<Member>,
    written_at: Instant,
    /// Whether we have ever held the key: until then, whoever has it is taken over.
    held: bool,
}

#[derive(Clone, Copy)]
struct Lease {
    id: i64,
    renew_at: Instant,
}

impl Holder {
    pub fn new(endpoints: Arc<Endpoints>, key: String, ttl: Duration, presence: Presence) -> Self {
        Self {
            endpoints,
            key,
            ttl,
            presence,
            lease: None,
            own: Vec::new(),
            revision: 0,
            written: None,
            written_at: Instant::now(),
            held: false,
        }
    }

    /// Until the owner leaves.
    pub async fn run(mut self, mut link: Link) {
        let mut left = pin!(self.presence.left());
        let mut backoff = Backoff::within_lease(self.ttl);
        loop {
            let advanced = tokio::select! {
                () = &mut left => break,
                advanced = self.advance() => advanced,
            };
            let pause = match advanced {
                Ok(()) => {
                    link.up();
                    backoff.reset();
                    None
                }
                Err(error @ Error::Superseded) => return link.ended(&error),
                Err(error) => {
                    link.down(&error);
                    Some(backoff.next())
                }
            };
            tokio::select! {
                () = &mut left => break,
                () = self.wait(pause) => {}
            }
        }
        self.leave().await;
    }

    /// Does whatever is due: grant, renew, write.
    async fn advance(&mut self) -> Result<(), Error> {
        let lease = match self.lease {
            Some(lease) => lease,
            None => self.grant().await?,
        };
        if lease.renew_at <= Instant::now() {
            self.renew(lease.id).await?;
        }
        let member = self.presence.latest();
        if self.written.as_ref() != Some(&member) {
            self.write(lease.id, member).await?;
        }
        Ok(())
    }

    /// Until something is due again, or for the given pause.
    async fn wait(&mut self, pause: Option<Duration>) {
        if let Some(pause) = pause {
            return time::sleep(pause).await;
        }
        let renew_at = self.lease.map_or_else(Instant::now, |lease| lease.renew_at);
        let write_at = self.written_at + PACE;
        tokio::select! {
            () = time::sleep_until(renew_at) => {}
            () = async { self.presence.changed().await; time::sleep_until(write_at).await } => {}
        }
    }

    async fn grant(&mut self) -> Result<Lease, Error> {
        let renew_at = Instant::now() + self.ttl / 3;
        let seconds = self.ttl.as_secs() as i64;
        let grant =
            |client: etcd_client::Client| async move { client.lease_client().grant(seconds, None).await };
        let id = self.endpoints.call(grant).await?.id();
        let lease = Lease { id, renew_at };
        if self.own.len() == LEASES {
            self.own.remove(0);
        }
        self.own.push(id);
        self.written = None;
        Ok(*self.lease.insert(lease))
    }

    /// Renews the lease and looks whether the key is still as written: it may have been taken over, or
    /// deleted by hand.
    async fn renew(&mut self, id: i64) -> Result<(), Error> {
        let started = Instant::now();
        let renew =
            |client: etcd_client::Client| async move { client.lease_client().keep_alive(id).await.map(drop) };
        let renewed = self.endpoints.call(renew).await;
        self.unless_lost(renewed)?;
        let key = &self.key;
        let get =
            |client: etcd_client::Client| async move { client.kv_client().get(key.as_str(), None).await };
        let found = self.endpoints.call(get).await?;
        let found = found.kvs().first().map_or(0, KeyValue::mod_revision);
        if found != self.revision {
            self.written = None;
        }
        self.lease = Some(Lease { id, renew_at: started + self.ttl / 3 });
        Ok(())
    }

    async fn write(&mut self, lease: i64, member: Member) -> Result<(), Error> {
        for _ in 0..WRITES {
            let txn = self.conditional_put(lease, &member);
            let put = |client: etcd_client::Client| {
                let txn = txn.clone();
                async move { client.kv_client().txn(txn).await }
            };
            let written = self.endpoints.call(put).await;
            let response = self.unless_lost(written)?;
            if response.succeeded() {
                self.wrote(&response, member);
                return Ok(());
            }
            self.revision = self.take_over(&response)?;
        }
        Err(Error::Contended)
    }

    fn conditional_put(&self, lease: i64, member: &Member) -> Txn {
        let key = self.key.as_str();
        let options = PutOptions::new().with_lease(lease);
        Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, self.revision)])
            .and_then([TxnOp::put(key, member.encode_to_vec(), Some(options))])
            .or_else([TxnOp::get(key, None)])
    }

    fn wrote(&mut self, response: &TxnResponse, member: Member) {
        self.revision = response.header().map_or(0, |header| header.revision());
        self.written = Some(member);
        self.written_at = Instant::now();
        self.held = true;
        self.presence.set_visible();
    }

    /// The revision to write over, if the key is ours to write: it is absent, or was written under one
    /// of our leases, or we have only just joined.
    fn take_over(&self, response: &TxnResponse) -> Result<i64, Error> {
        let found = response.op_responses();
        let Some(TxnOpResponse::Get(found)) = found.first() else {
            return Ok(0);
        };
        match found.kvs().first() {
            None => Ok(0),
            Some(kv) if !self.held || self.own.contains(&kv.lease()) => Ok(kv.mod_revision()),
            Some(_) => Err(Error::Superseded),
        }
    }

    /// Forgets the lease if etcd says that there is none: the next round begins with a new one.
    fn unless_lost<T>(&mut self, answer: Result<T, Error>) -> Result<T, Error> {
        if answer.as_ref().is_err_and(is_lease_lost) {
            self.lease = None;
        }
        answer
    }

    /// Writes the last record, by which others know how it left; revoking the lease then deletes the key. No use
    /// trying for longer than the lease lives.
    async fn leave(mut self) {
        let Some(Lease { id, .. }) = self.lease else {
            return;
        };
        let last = self.presence.latest();
        if self.written.as_ref() != Some(&last) {
            let _ = time::timeout(LAST_RECORD, self.write(id, last)).await;
        }
        let mut backoff = Backoff::within_lease(self.ttl);
        let revoke =
            |client: etcd_client::Client| async move { client.lease_client().revoke(id).await.map(drop) };
        let until_revoked = async {
            while let Err(error) = self.endpoints.call(revoke).await {
                if is_lease_lost(&error) {
                    break;
                }
                time::sleep(backoff.next()).await;
            }
        };
        let _ = time::timeout(self.ttl, until_revoked).await;
    }
}

fn is_lease_lost(error: &Error) -> bool {
    match error {
        Error::Etcd(etcd_client::Error::LeaseKeepAliveError(_)) => true,
        Error::Etcd(etcd_client::Error::GRpcStatus(status)) => status.code() == Code::NotFound,
        _ => false,
    }
}
