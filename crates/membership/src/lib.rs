//! Who is in the cluster. One contract, three sources: etcd, the registry a router serves when
//! there is no etcd, and one inside the process for simulated clusters. Views are whole sets, never deltas. Losing the source never empties a view:
//! serving goes on with the last one, and joins wait.
//!
//! A member's id names one incarnation of a process. Should two registrations use one id, the later
//! join wins: the earlier one is told, says so in the log, and stays silent from then on.

mod config;
mod error;
mod etcd;
mod memory;
mod registration;
mod registry;
mod registry_client;
mod retry;
mod roster;

pub use config::{MembershipConfig, connect, connect_by, registry};
pub use error::Error;
pub use etcd::{Endpoint, EtcdTls, survey};
pub use memory::Memory;
pub use registration::Registration;
pub use registry::RegistryServer;

use proto::Member;
use std::collections::VecDeque;
use tokio::sync::watch;

/// All members at one time, ascending by id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    pub members: Vec<Member>,
    /// Grows with each change this observer has seen.
    pub revision: u64,
    /// Whether the source answers now; if not, `members` is what it last said.
    pub connected: bool,
    /// Ids of the latest that went with `draining` in their last record: they left in good order. An observer that
    /// sees only some views may never have seen that record. At most [`LEFT`], the latest last. Who left while an
    /// observer's watch of etcd was down is missing here: etcd keeps no word of it.
    pub left: VecDeque<String>,
}

/// Ids in [`View::left`].
pub const LEFT: usize = 64;

/// Calls may come from any task of a tokio runtime; work goes on in tasks of that runtime.
pub trait Membership: Send + Sync {
    /// Makes `member` visible to every watcher and keeps it so until the registration leaves or is
    /// dropped; retries for ever, also after a lost lease (same id: it is the same incarnation).
    fn join(&self, member: Member) -> Registration;

    /// Current and later views. The receiver's value is the last known view, initially empty.
    /// Watching starts with the first call; all receivers of one client share one stream.
    fn watch(&self) -> watch::Receiver<View>;
}
