//! [`Membership`] over a router's registry: one gRPC channel, one Watch stream for all receivers, and
//! one Join stream per registration. Streams that break or fall silent are opened again, for ever.

use crate::{
    Error, Membership, Registration, View,
    registration::Presence,
    retry::{Backoff, Link},
    roster::Roster,
};
use proto::{
    Dial, JoinMessage, JoinReply, Keepalive, Member, WatchRequest, join_message::Message,
    registry_client::RegistryClient as Client,
};
use std::{sync::OnceLock, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{self, Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};

/// For connecting, and for the first answer on a new stream.
const ANSWER: Duration = Duration::from_secs(1);
/// A connection whose pings stay unanswered for so long is given up.
const PING: Duration = Duration::from_secs(2);
/// Longest back-off. A registry's lease is not known before it has answered once.
const RETRY: Duration = Duration::from_secs(1);
/// Least time between two updates of one member.
const PACE: Duration = Duration::from_millis(50);
/// If a registry does not say.
const DEFAULT_LEASE: Duration = Duration::from_secs(5);

pub(crate) struct RegistryClient {
    endpoint: Endpoint,
    dial: Dial,
    channel: OnceLock<Channel>,
    view: watch::Sender<View>,
    watcher: OnceLock<JoinHandle<()>>,
}

impl RegistryClient {
    pub fn new(endpoint: Endpoint, dial: Dial) -> Self {
        let endpoint = endpoint
            .connect_timeout(ANSWER)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true);
        let (channel, watcher) = (OnceLock::new(), OnceLock::new());
        Self { endpoint, dial, channel, view: watch::Sender::default(), watcher }
    }

    fn client(&self) -> Client<Channel> {
        let channel = self.channel.get_or_init(|| self.dial.channel(&self.endpoint));
        Client::new(channel.clone())
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
    }

    fn link(&self, subject: &str) -> Link {
        Link::new(format!("{subject} registry {}", self.endpoint.uri()))
    }
}

impl Membership for RegistryClient {
    fn join(&self, member: Member) -> Registration {
        let client = self.client();
        let link = self.link(&format!("member {} in", member.id));
        Registration::spawn(member, |presence| hold(client, presence, link))
    }

    fn watch(&self) -> watch::Receiver<View> {
        self.watcher.get_or_init(|| {
            let roster = Roster::new(self.view.clone());
            tokio::spawn(follow(self.client(), roster, self.link("watch of")))
        });
        self.view.subscribe()
    }
}

impl Drop for RegistryClient {
    fn drop(&mut self) {
        self.watcher.get().inspect(|watcher| watcher.abort());
    }
}

async fn follow(client: Client<Channel>, mut roster: Roster, mut link: Link) {
    let mut backoff = Backoff::new(RETRY);
    loop {
        let started = Instant::now();
        if let Err(error) = follow_once(client.clone(), &mut roster, &mut link).await {
            roster.disconnected();
            link.down(&error);
        }
        if started.elapsed() > RETRY {
            backoff.reset();
        }
        time::sleep(backoff.next()).await;
    }
}

async fn follow_once(mut client: Client<Channel>, roster: &mut Roster, link: &mut Link) -> Result<(), Error> {
    let request = client.watch(WatchRequest {});
    let mut views = answer(request).await??.into_inner();
    let view = answer(views.message()).await??.ok_or(Error::Ended)?;
    let lease = lease(view.lease_ms);
    roster.reconnected(view.members, view.left, lease);
    link.up();
    loop {
        tokio::select! {
            view = time::timeout(lease, views.message()) => {
                let view = view.map_err(|_| Error::Silent(lease))??;
                let view = view.ok_or(Error::Ended)?;
                roster.replace(view.members, view.left);
            }
            () = roster.expire() => {}
        }
    }
}

async fn hold(client: Client<Channel>, mut presence: Presence, mut link: Link) {
    let mut backoff = Backoff::new(RETRY);
    let mut left = std::pin::pin!(presence.left());
    loop {
        let started = Instant::now();
        match hold_once(client.clone(), &mut presence, &mut link).await {
            Ok(()) => return,
            Err(error @ Error::Superseded) => return link.ended(&error),
            Err(error) => link.down(&error),
        }
        if started.elapsed() > RETRY {
            backoff.reset();
        }
        tokio::select! {
            () = &mut left => return,
            () = time::sleep(backoff.next()) => {}
        }
    }
}

/// One Join stream, until the owner leaves (`Ok`) or the stream fails.
async fn hold_once(
    mut client: Client<Channel>,
    presence: &mut Presence,
    link: &mut Link,
) -> Result<(), Error> {
    let (sender, receiver) = mpsc::channel(4);
    send(&sender, Message::Join(presence.latest()))?;
    let request = client.join(ReceiverStream::new(receiver));
    let mut replies = answer(request).await??.into_inner();
    let lease = lease(heard(answer(replies.message()).await?)?.lease_ms);
    presence.set_visible();
    link.up();
    converse(&sender, &mut replies, presence, lease).await?;
    drop(sender);
    // The registry ends its side when it has taken the leave.
    let _ = answer(async { while let Ok(Some(_)) = replies.message().await {} }).await;
    Ok(())
}

async fn converse(
    sender: &mpsc::Sender<JoinMessage>,
    replies: &mut Streaming<JoinReply>,
    presence: &mut Presence,
    lease: Duration,
) -> Result<(), Error> {
    let mut left = std::pin::pin!(presence.left());
    let mut keepalive = time::interval(lease / 3);
    keepalive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard_at = Instant::now();
    let mut updated_at = heard_at;
    loop {
        tokio::select! {
            // The last record, by which others know how it left.
            () = &mut left => return send(sender, Message::Update(presence.latest())),
            reply = replies.message() => {
                heard(reply)?;
                heard_at = Instant::now();
            }
            _ = keepalive.tick() => {
                if heard_at.elapsed() > lease * 2 / 3 {
                    return Err(Error::Silent(heard_at.elapsed()));
                }
                send(sender, Message::Keepalive(Keepalive {}))?;
            }
            () = async { presence.changed().await; time::sleep_until(updated_at + PACE).await } => {
                send(sender, Message::Update(presence.latest()))?;
                updated_at = Instant::now();
            }
        }
    }
}

/// Never waits: a full queue means that the peer has stopped reading.
fn send(sender: &mpsc::Sender<JoinMessage>, message: Message) -> Result<(), Error> {
    let message = Some(message);
    sender.try_send(JoinMessage { message }).map_err(|_| Error::Ended)
}

fn heard(reply: Result<Option<JoinReply>, tonic::Status>) -> Result<JoinReply, Error> {
    match reply {
        Ok(reply) => reply.ok_or(Error::Ended),
        Err(status) if status.code() == Code::Aborted => Err(Error::Superseded),
        Err(status) => Err(status.into()),
    }
}

async fn answer<T>(request: impl Future<Output = T>) -> Result<T, Error> {
    time::timeout(ANSWER, request).await.map_err(|_| Error::Silent(ANSWER))
}

fn lease(ms: u32) -> Duration {
    match ms {
        0 => DEFAULT_LEASE,
        ms => Duration::from_millis(ms.into()),
    }
}
