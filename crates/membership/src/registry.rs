//! The registry: members held in memory by the router, for deployments without etcd. Served over
//! gRPC to workers and gateways, and at once the router's own [`Membership`]. Nothing is stored: after
//! a restart the members join again by themselves, and watchers grant them one lease to do so.

use crate::{
    Membership, Registration, View,
    roster::{change_view, put, remove},
};
use futures::{Stream, stream};
use proto::{JoinMessage, JoinReply, Member, WatchRequest, join_message::Message, registry_server};
use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

const MAX_MEMBERS: usize = 100_000;
const MAX_ID_BYTES: usize = 256;
/// Replies not yet taken by a client. More would only tell it again that it is heard.
const REPLIES: usize = 8;
/// Least time between two views on one stream: what changes within it is sent as one view.
const PACE: Duration = Duration::from_millis(10);

/// Cheap to clone; all clones are the same registry.
#[derive(Clone)]
pub struct RegistryServer {
    shared: Arc<Shared>,
}

struct Shared {
    lease: Duration,
    view: watch::Sender<View>,
    holders: Mutex<Holders>,
    closing: watch::Sender<bool>,
}

/// Which join holds which member: a later one with the same id takes it over.
#[derive(Default)]
struct Holders {
    by_id: HashMap<String, u64>,
    last: u64,
}

impl RegistryServer {
    /// A member silent for longer than `lease` is removed.
    pub fn new(lease: Duration) -> Self {
        let view = View { connected: true, ..View::default() };
        let shared = Shared {
            lease,
            view: watch::Sender::new(view),
            holders: Mutex::default(),
            closing: watch::Sender::new(false),
        };
        Self { shared: Arc::new(shared) }
    }

    /// For `tonic::transport::Server::add_service`.
    pub fn service(&self) -> registry_server::RegistryServer<Self> {
        registry_server::RegistryServer::new(self.clone())
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
    }

    /// Ends every stream, so that a graceful shutdown of the server need not wait for its clients.
    /// They keep their views and look for the registry until it is back.
    pub fn close(&self) {
        self.shared.closing.send_replace(true);
    }
}

impl Membership for RegistryServer {
    fn join(&self, member: Member) -> Registration {
        let claim = Claim::new(&self.shared, member.clone());
        Registration::spawn(member, |mut presence| async move {
            presence.set_visible();
            let mut left = std::pin::pin!(presence.left());
            loop {
                tokio::select! {
                    () = &mut left => break,
                    () = presence.changed() => {}
                }
                if !claim.update(presence.latest()) {
                    return tracing::warn!(id = claim.id, "{}", crate::Error::Superseded);
                }
            }
            // The last record, by which others know how it left.
            claim.update(presence.latest());
        })
    }

    fn watch(&self) -> watch::Receiver<View> {
        self.shared.view.subscribe()
    }
}

/// One join's hold on a member; dropping it removes the member, unless a later join has it.
struct Claim {
    shared: Arc<Shared>,
    id: String,
    number: u64,
}

impl Claim {
    fn new(shared: &Arc<Shared>, member: Member) -> Self {
        let mut holders = shared.holders();
        holders.last += 1;
        let number = holders.last;
        holders.by_id.insert(member.id.clone(), number);
        let id = member.id.clone();
        change_view(&shared.view, |view| put(view, member));
        drop(holders);
        Self { shared: shared.clone(), id, number }
    }

    /// False if a later join holds the member now.
    fn update(&self, mut member: Member) -> bool {
        let holders = self.shared.holders();
        let mine = self.is_mine(&holders);
        if mine {
            member.id.clone_from(&self.id);
            change_view(&self.shared.view, |view| put(view, member));
        }
        mine
    }

    fn holds(&self) -> bool {
        self.is_mine(&self.shared.holders())
    }

    fn is_mine(&self, holders: &Holders) -> bool {
        holders.by_id.get(&self.id) == Some(&self.number)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut holders = self.shared.holders();
        if self.is_mine(&holders) {
            holders.by_id.remove(&self.id);
            change_view(&self.shared.view, |view| remove(view, &self.id));
        }
    }
}

impl Shared {
    /// Held while the view changes too, so that both always agree.
    fn holders(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lease_ms(&self) -> u32 {
        self.lease.as_millis().try_into().unwrap_or(u32::MAX)
    }

    async fn closed(&self) -> Status {
        let mut closing = self.closing.subscribe();
        // The sender lives in self, so the wait ends by the value alone.
        let _ = closing.wait_for(|closing| *closing).await;
        Status::unavailable("the registry is shutting down")
    }

    async fn serve_join(
        self: &Arc<Self>,
        messages: &mut Streaming<JoinMessage>,
        replies: &mpsc::Sender<Result<JoinReply, Status>>,
    ) -> Result<(), Status> {
        let claim = self.admit(next(messages, self.lease).await?)?;
        loop {
            // A client that does not read its replies gets fewer of them.
            let _ = replies.try_send(Ok(JoinReply { lease_ms: self.lease_ms() }));
            let heard = Instant::now();
            match next(messages, self.lease).await {
                Ok(None) => return Ok(()),
                Ok(Some(message)) => take(&claim, message)?,
                // The connection broke. Its owner may come back by another, until the lease ends.
                Err(status) => {
                    time::sleep_until(heard + self.lease).await;
                    return Err(status);
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, first: Option<Message>) -> Result<Claim, Status> {
        let Some(Message::Join(member)) = first else {
            return Err(Status::invalid_argument("the first message of a Join stream must be `join`"));
        };
        if member.id.is_empty() || member.id.len() > MAX_ID_BYTES {
            return Err(Status::invalid_argument(format!(
                "a member id has 1 to {MAX_ID_BYTES} bytes; this one has {}",
                member.id.len()
            )));
        }
        if self.holders().by_id.len() >= MAX_MEMBERS {
            return Err(Status::resource_exhausted(format!(
                "the registry holds {MAX_MEMBERS} members and takes no more"
            )));
        }
        Ok(Claim::new(self, member))
    }
}

/// The next message of a member; an error if it stays away for a lease.
async fn next(messages: &mut Streaming<JoinMessage>, lease: Duration) -> Result<Option<Message>, Status> {
    match time::timeout(lease, messages.message()).await {
        Ok(message) => Ok(message?.and_then(|message| message.message)),
        Err(_) => Err(Status::deadline_exceeded(format!("no message within the lease of {lease:?}"))),
    }
}

fn take(claim: &Claim, message: Message) -> Result<(), Status> {
    let holds = match message {
        Message::Update(member) | Message::Join(member) => claim.update(member),
        Message::Keepalive(_) => claim.holds(),
    };
    match holds {
        true => Ok(()),
        false => Err(Status::aborted(crate::Error::Superseded.to_string())),
    }
}

#[tonic::async_trait]
impl registry_server::Registry for RegistryServer {
    type JoinStream = ReceiverStream<Result<JoinReply, Status>>;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<proto::View, Status>> + Send>>;

    async fn join(
        &self,
        request: Request<Streaming<JoinMessage>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let shared = self.shared.clone();
        let mut messages = request.into_inner();
        let (replies, receiver) = mpsc::channel(REPLIES);
        // A task of its own: a lease must run out also when nobody reads the replies.
        tokio::spawn(async move {
            let result = tokio::select! {
                result = shared.serve_join(&mut messages, &replies) => result,
                status = shared.closed() => Err(status),
            };
            if let Err(status) = result {
                tracing::debug!("a member's stream ended: {status}");
                let _ = replies.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut view = self.shared.view.subscribe();
        view.mark_changed();
        let views = stream::unfold(Some((self.shared.clone(), view)), |state| async {
            let (shared, mut view) = state?;
            tokio::select! {
                next = next_view(&shared, &mut view) => Some((Ok(next), Some((shared, view)))),
                status = shared.closed() => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(views)))
    }
}

/// The view after its next change, or again after a third of a lease: silence would mean death.
async fn next_view(shared: &Shared, view: &mut watch::Receiver<View>) -> proto::View {
    if !view.has_changed().unwrap_or(false) {
        let _ = time::timeout(shared.lease / 3, view.changed()).await;
    }
    time::sleep(PACE).await;
    let view = view.borrow_and_update();
    proto::View {
        members: view.members.clone(),
        revision: view.revision,
        lease_ms: shared.lease_ms(),
        left: view.left.iter().cloned().collect(),
    }
}
