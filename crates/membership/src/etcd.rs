//! [`Membership`] over etcd. Members are encoded [`Member`]s under `/<prefix>/members/<id>`, each
//! attached to a lease of its own. Every call is tried on every endpoint, so the death of any one of
//! them goes unnoticed; the death of all of them leaves the view as it was.
//!
//! A busy member writes up to five times a second and etcd keeps every revision until told otherwise:
//! run it with `--auto-compaction-retention` (say 10m), or its quota of 2 GiB will fill up.

mod endpoints;
mod holder;
mod survey;
mod tls;
mod watcher;

use crate::{Membership, MembershipConfig, Registration, View, retry::Link, roster::Roster};
use endpoints::Endpoints;
use holder::Holder;
use proto::Member;
use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};
pub use survey::{Endpoint, survey};
pub use tls::EtcdTls;
use tokio::{sync::watch, task::JoinHandle};
use watcher::Watcher;

pub(crate) struct Etcd {
    endpoints: Arc<Endpoints>,
    /// Of all members: `/<prefix>/members/`.
    prefix: String,
    /// Whole seconds, as etcd counts.
    ttl: Duration,
    view: watch::Sender<View>,
    watcher: OnceLock<JoinHandle<()>>,
}

impl Etcd {
    pub fn new(config: &MembershipConfig) -> Self {
        let ttl = Duration::from_secs(config.lease_ms.div_ceil(1000));
        Self {
            endpoints: Arc::new(Endpoints::new(config.etcd.clone(), config.tls.clone(), ttl)),
            prefix: format!("/{}/members/", config.prefix),
            ttl,
            view: watch::Sender::default(),
            watcher: OnceLock::new(),
        }
    }

    fn watcher(&self) -> Watcher {
        Watcher {
            endpoints: self.endpoints.clone(),
            prefix: self.prefix.clone(),
            ttl: self.ttl,
            roster: Roster::new(self.view.clone()),
            link: Link::new(format!("watch of etcd {}", self.endpoints)),
        }
    }
}

impl Membership for Etcd {
    fn join(&self, member: Member) -> Registration {
        let key = format!("{}{}", self.prefix, member.id);
        let link = Link::new(format!("member {} in etcd {}", member.id, self.endpoints));
        let endpoints = self.endpoints.clone();
        let ttl = self.ttl;
        Registration::spawn(member, move |presence| Holder::new(endpoints, key, ttl, presence).run(link))
    }

    fn watch(&self) -> watch::Receiver<View> {
        self.watcher.get_or_init(|| tokio::spawn(self.watcher().run()));
        self.view.subscribe()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.watcher.get().inspect(|watcher| watcher.abort());
    }
}
