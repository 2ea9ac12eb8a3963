//! A member's presence, seen from its owner. A task holds it at the source; between the two lies one
//! record, the latest wanted, so that any number of updates coalesce into whatever is sent next.

use proto::Member;
use std::{future::Future, time::Duration};
use tokio::{sync::watch, task::JoinHandle, time};

/// How long [`Registration::leave`] waits for the source to confirm; the lease ends it anyway.
pub(crate) const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);

/// A member's presence. Dropping it leaves without waiting.
#[must_use = "dropping a registration leaves the cluster"]
pub struct Registration {
    wanted: watch::Sender<Member>,
    joined: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Registration {
    /// Changes the record and sees that it becomes visible. Never blocks: updates that come faster
    /// than the source takes them are merged. The id stays what it was.
    pub fn update(&self, change: impl FnOnce(&mut Member)) {
        self.wanted.send_if_modified(|member| {
            let before = member.clone();
            change(member);
            member.id.clone_from(&before.id);
            *member != before
        });
    }

    /// Waits until the member has first become visible; at once if it has already.
    pub async fn joined(&self) {
        let mut joined = self.joined.clone();
        if joined.wait_for(|joined| *joined).await.is_err() {
            // Superseded before it was ever visible: it never will be.
            std::future::pending::<()>().await;
        }
    }

    /// Leaves, and waits a bounded time for the source to have taken note.
    pub async fn leave(self) {
        let Self { wanted, task, .. } = self;
        drop(wanted);
        let _ = time::timeout(LEAVE_TIMEOUT, task).await;
    }

    /// `hold` keeps the presence until its side says that the owner has left.
    pub(crate) fn spawn<F>(member: Member, hold: impl FnOnce(Presence) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (wanted, receiver) = watch::channel(member);
        let (visible, joined) = watch::channel(false);
        let presence = Presence { wanted: receiver, visible };
        Self { wanted, joined, task: tokio::spawn(hold(presence)) }
    }
}

/// The holding task's side of a registration.
pub(crate) struct Presence {
    wanted: watch::Receiver<Member>,
    visible: watch::Sender<bool>,
}

impl Presence {
    /// The latest wanted record; [`Self::changed`] waits for a later one.
    pub fn latest(&mut self) -> Member {
        self.wanted.borrow_and_update().clone()
    }

    pub fn set_visible(&self) {
        self.visible.send_replace(true);
    }

    /// Waits for a record later than the last [`Self::latest`]; for ever once the owner has left.
    /// Cancelling the wait, even just after it was over, loses nothing.
    pub async fn changed(&mut self) {
        match self.wanted.changed().await {
            Ok(()) => self.wanted.mark_changed(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Resolves when the owner has left. Independent of `self`, so that it can guard other work.
    pub fn left(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut wanted = self.wanted.clone();
        async move { while wanted.changed().await.is_ok() {} }
    }
}
