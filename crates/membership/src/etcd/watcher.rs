//! Follows all members in etcd. Each (re)start reads the whole set and watches from the revision after
//! it, on one endpoint: this is right also after a compaction, and after etcd came back without its data
//! (where a watch from the last revision seen would wait for ever).

use super::endpoints::Endpoints;
use crate::{
    Error,
    retry::{Backoff, Link},
    roster::{Change, Roster},
};
use etcd_client::{
    Client, Event, EventType, GetOptions, GetResponse, KeyValue, WatchOptions, WatchResponse, WatchStream,
};
use prost::Message as _;
use proto::Member;
use std::{sync::Arc, time::Duration};
use tokio::time::{self, Instant, MissedTickBehavior};

pub(crate) struct Watcher {
    pub endpoints: Arc<Endpoints>,
    pub prefix: String,
    pub ttl: Duration,
    pub roster: Roster,
    pub link: Link,
}

impl Watcher {
    pub async fn run(mut self) {
        let mut backoff = Backoff::within_lease(self.ttl);
        loop {
            match self.start().await {
                Ok((found, stream)) => {
                    self.link.up();
                    self.roster.reconnected(self.members(&found), [], self.ttl);
                    let started = Instant::now();
                    // The loss of one endpoint is not the loss of etcd: say nothing yet.
                    if let Err(error) = self.follow(stream).await {
                        tracing::debug!("watch of etcd interrupted: {error}");
                    }
                    if started.elapsed() > self.ttl {
                        backoff.reset();
                    }
                }
                Err(error) => {
                    self.roster.disconnected();
                    self.link.down(&error);
                }
            }
            time::sleep(backoff.next()).await;
        }
    }

    async fn start(&self) -> Result<(GetResponse, WatchStream), Error> {
        let prefix = self.prefix.as_str();
        let start = |client: Client| async move {
            let limit = proto::MAX_MESSAGE_BYTES;
            let mut kv = client.kv_client().max_decoding_message_size(limit);
            let all = GetOptions::new().with_prefix();
            let found = kv.get(prefix, Some(all)).await?;
            let revision = found.header().map_or(0, |header| header.revision());
            let later = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
            let mut watch = client.watch_client().max_decoding_message_size(limit);
            let stream = watch.watch(prefix, Some(later)).await?;
            Ok((found, stream))
        };
        self.endpoints.call(start).await
    }

    /// Until the stream fails, or stays silent although it was asked for a sign of life.
    async fn follow(&mut self, stream: WatchStream) -> Result<(), Error> {
        let (mut requests, mut responses) = stream.split();
        let silence = self.ttl * 2 / 3;
        let mut ask = time::interval(self.ttl / 3);
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                response = responses.message() => {
                    heard = Instant::now();
                    self.take(&response?.ok_or(Error::Ended)?)?;
                }
                _ = ask.tick() => {
                    if heard.elapsed() > silence {
                        return Err(Error::Silent(heard.elapsed()));
                    }
                    time::timeout(silence, requests.request_progress())
                        .await
                        .map_err(|_| Error::Silent(silence))??;
                }
                () = self.roster.expire() => {}
            }
        }
    }

    fn take(&mut self, response: &WatchResponse) -> Result<(), Error> {
        if response.canceled() {
            let reason = response.cancel_reason();
            return Err(Error::WatchCancelled(reason.to_owned()));
        }
        let changes: Vec<_> = response.events().iter().filter_map(|event| self.change(event)).collect();
        self.roster.apply(changes);
        Ok(())
    }

    fn change(&self, event: &Event) -> Option<Change> {
        let kv = event.kv()?;
        match event.event_type() {
            EventType::Put => self.member(kv).map(|member| Change::Put(member.into())),
            EventType::Delete => self.id(kv).map(|id| Change::Remove(id.to_owned())),
        }
    }

    fn members(&self, found: &GetResponse) -> Vec<Member> {
        found.kvs().iter().filter_map(|kv| self.member(kv)).collect()
    }

    /// Foreign records are not ours to judge: they are left out and named in the log.
    fn member(&self, kv: &KeyValue) -> Option<Member> {
        let id = self.id(kv)?;
        match Member::decode(kv.value()) {
            Ok(member) if member.id == id => Some(member),
            Ok(member) => {
                tracing::warn!(id, found = member.id, "etcd key and record name different members");
                None
            }
            Err(error) => {
                tracing::warn!(id, "etcd holds something that is not a member: {error}");
                None
            }
        }
    }

    fn id<'a>(&self, kv: &'a KeyValue) -> Option<&'a str> {
        kv.key_str().ok()?.strip_prefix(&self.prefix)
    }
}
