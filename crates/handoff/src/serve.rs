//! The server side of one `Handoff.Deliver` call: hears a stream and puts its messages into the inbox of the
//! reservation that it names. Decides nothing itself.

use crate::receive::{Content, Inbox, Parcel, Replies};
use proto::{ErrorCode, deliver_message::Message, deliver_reply::Reply};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::Instrument;

/// Replies that may wait for the transport; more than a sender's window of blocks.
const REPLIES: usize = 256;

/// What the decode worker is asked for.
pub trait Reservations: Send + Sync + 'static {
    /// The inbox of a living reservation.
    fn inbox(&self, reservation: u64) -> Option<Inbox>;

    /// The engine's pulse.
    fn heartbeat(&self) -> proto::Heartbeat;
}

/// Serves one call in a task of its own. `silence` bounds the wait for the opening message.
pub fn serve(
    messages: Streaming<proto::DeliverMessage>,
    reservations: Arc<impl Reservations>,
    heartbeat: Duration,
    silence: Duration,
) -> ReceiverStream<Result<proto::DeliverReply, Status>> {
    let (replies, stream) = mpsc::channel(REPLIES);
    let task = async move {
        let opened = tokio::time::timeout(silence, open(messages, &*reservations, &replies)).await;
        let outcome = match opened {
            Ok(Ok(delivery)) => delivery.hear(&*reservations, heartbeat).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(proto::Error::new(ErrorCode::Deadline, "the delivery did not open in time")),
        };
        if let Err(error) = outcome {
            let _ = replies.try_send(Ok(proto::DeliverReply { reply: Some(Reply::Error(error)) }));
        }
    };
    tokio::spawn(task.in_current_span());
    ReceiverStream::new(stream)
}

struct Delivery {
    id: u64,
    epoch: u32,
    messages: Streaming<proto::DeliverMessage>,
    inbox: Inbox,
    replies: Replies,
}

async fn open(
    mut messages: Streaming<proto::DeliverMessage>,
    reservations: &impl Reservations,
    replies: &Replies,
) -> Result<Delivery, proto::Error> {
    let Some(Message::Open(open)) = messages.message().await?.and_then(|message| message.message) else {
        return Err(proto::Error::new(ErrorCode::InvalidRequest, "a delivery begins with `open`"));
    };
    let (id, epoch) = (open.reservation, open.epoch);
    tracing::debug!(reservation = id, epoch, member = open.member, "delivery opened");
    let inbox = reservations.inbox(id).ok_or_else(|| ended(id))?;
    let delivery = Delivery { id, epoch, messages, inbox, replies: replies.clone() };
    if delivery.put(Content::Open(open)).await { Ok(delivery) } else { Err(ended(id)) }
}

fn ended(id: u64) -> proto::Error {
    let message = format!("no reservation {id} here: it has ended");
    proto::Error::new(ErrorCode::UnknownReservation, message)
}

impl Delivery {
    /// Until the stream or the reservation ends. If the latter has said a last word of its own, that came first.
    async fn hear(
        mut self,
        reservations: &impl Reservations,
        heartbeat: Duration,
    ) -> Result<(), proto::Error> {
        let mut pulse = tokio::time::interval(heartbeat);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = self.messages.message() => {
                    let Some(content) = message.ok().flatten().map(content) else { break };
                    if !self.put(content?).await {
                        return Err(ended(self.id));
                    }
                }
                () = self.inbox.closed() => return Err(ended(self.id)),
                _ = pulse.tick() => self.beat(reservations.heartbeat()),
            }
        }
        self.put(Content::Closed).await;
        Ok(())
    }

    async fn put(&self, content: Content) -> bool {
        self.inbox.put(Parcel { epoch: self.epoch, content, replies: self.replies.clone() }).await
    }

    /// Half of the queue is for answers, which are not said twice; that much waiting is proof of life enough.
    fn beat(&self, heartbeat: proto::Heartbeat) {
        if self.replies.capacity() > REPLIES / 2 {
            let _ =
                self.replies.try_send(Ok(proto::DeliverReply { reply: Some(Reply::Heartbeat(heartbeat)) }));
        }
    }
}

fn content(message: proto::DeliverMessage) -> Result<Content, proto::Error> {
    match message.message {
        Some(Message::Offer(offer)) => Ok(Content::Offer(offer)),
        Some(Message::Commit(commit)) => Ok(Content::Commit(commit)),
        // A message of a kind this version does not know is a sign of life too.
        Some(Message::Heartbeat(_)) | None => Ok(Content::Heartbeat),
        Some(Message::Open(_)) => Err(proto::Error::new(ErrorCode::InvalidRequest, "a delivery opens once")),
    }
}
