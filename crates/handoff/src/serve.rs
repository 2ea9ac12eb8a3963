//! The gRPC service `baton.v1.Handoff` and the server side of one `Deliver` call: hears it and puts its messages into the inbox
//! of the reservation that it names. Decides nothing itself.

use crate::{
    receive::{Content, Inbox, Parcel},
    replies::Replies,
    unframing::{Heard, Messages},
};
use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
use proto::{DeliverMessage, DeliverReply, ErrorCode, deliver_message::Message, deliver_reply::Reply};
use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    body::Body,
    codec::{Codec, EncodeBody, SingleMessageCompressionOverride},
    server::NamedService,
};
use tonic_prost::ProstCodec;
use tower_service::Service;
use tracing::{Instrument, Span};

/// What the decode worker is asked for.
pub trait Reservations: Send + Sync + 'static {
    /// The inbox of a living reservation.
    fn inbox(&self, reservation: u64) -> Option<Inbox>;

    /// The engine's pulse.
    fn heartbeat(&self) -> proto::Heartbeat;

    /// How often it is told.
    fn heartbeat_every(&self) -> Duration;

    /// Longest wait for the message that opens a delivery.
    fn silence(&self) -> Duration;

    /// What the log lines of a call belong to, by its headers.
    fn span(&self, _headers: &HeaderMap) -> Span {
        Span::current()
    }
}

/// In the place of the generated server, which would copy every payload once more.
pub struct HandoffServer<R>(Arc<R>);

impl<R> HandoffServer<R> {
    pub fn new(reservations: Arc<R>) -> Self {
        HandoffServer(reservations)
    }
}

impl<R> Clone for HandoffServer<R> {
    fn clone(&self) -> Self {
        HandoffServer(self.0.clone())
    }
}

impl<R> NamedService for HandoffServer<R> {
    const NAME: &'static str = "baton.v1.Handoff";
}

impl<R: Reservations> Service<http::Request<Body>> for HandoffServer<R> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (head, body) = request.into_parts();
        ready(Ok(match head.uri.path().rsplit('/').next() {
            Some("Deliver") => answer(serve(body, self.0.clone(), self.0.span(&head.headers))),
            _ => Status::unimplemented(format!("{} has no call {}", Self::NAME, head.uri.path())).into_http(),
        }))
    }
}

fn answer(replies: ReceiverStream<Result<DeliverReply, Status>>) -> http::Response<Body> {
    let encoder = ProstCodec::<DeliverReply, DeliverMessage>::default().encoder();
    let same = SingleMessageCompressionOverride::default();
    let mut response =
        http::Response::new(Body::new(EncodeBody::new_server(encoder, replies, None, same, None)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Serves one call in a task of its own.
fn serve(
    body: Body,
    reservations: Arc<impl Reservations>,
    span: Span,
) -> ReceiverStream<Result<DeliverReply, Status>> {
    let (replies, stream) = Replies::channel();
    let task = async move {
        let opening = open(Messages::new(body), &*reservations, &replies);
        let outcome = match tokio::time::timeout(reservations.silence(), opening).await {
            Ok(Ok(delivery)) => delivery.hear(&*reservations).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(proto::Error::new(ErrorCode::Deadline, "the delivery did not open in time")),
        };
        if let Err(error) = outcome {
            replies.say(Reply::Error(error));
        }
    };
    tokio::spawn(task.instrument(span));
    stream
}

struct Delivery {
    id: u64,
    epoch: u32,
    messages: Messages,
    inbox: Inbox,
    replies: Replies,
}

async fn open(
    mut messages: Messages,
    reservations: &impl Reservations,
    replies: &Replies,
) -> Result<Delivery, proto::Error> {
    let Some((Some(Message::Open(open)), _)) = messages.next().await? else {
        return Err(proto::Error::new(ErrorCode::InvalidRequest, "a delivery begins with `open`"));
    };
    let (id, epoch) = (open.reservation, open.epoch);
    tracing::debug!(reservation = id, epoch, member = open.member, "delivery opened");
    let inbox = reservations.inbox(id).ok_or_else(|| ended(id))?;
    let mut delivery = Delivery { id, epoch, messages, inbox, replies: replies.clone() };
    if delivery.put(Content::Open(open)).await { Ok(delivery) } else { Err(ended(id)) }
}

fn ended(id: u64) -> proto::Error {
    let message = format!("no reservation {id} here: it has ended");
    proto::Error::new(ErrorCode::UnknownReservation, message)
}

impl Delivery {
    /// Until the stream or the reservation ends. If the latter has said a last word of its own, that came first.
    async fn hear(mut self, reservations: &impl Reservations) -> Result<(), proto::Error> {
        let mut pulse = tokio::time::interval(reservations.heartbeat_every());
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut held = None;
        let heard = loop {
            tokio::select! {
                // What waits for room in the inbox keeps later messages on the wire.
                room = self.inbox.room(), if held.is_some() => {
                    let (Some(room), Some(content)) = (room, held.take()) else { return Err(ended(self.id)) };
                    room.send(self.parcel(content));
                }
                message = self.messages.next(), if held.is_none() => match message.and_then(content) {
                    Ok(Some(content)) => held = Some(content),
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                },
                () = self.inbox.closed() => return Err(ended(self.id)),
                _ = pulse.tick() => self.replies.beat(reservations.heartbeat()),
            }
        };
        self.put(Content::Closed).await;
        heard
    }

    async fn put(&mut self, content: Content) -> bool {
        let room = self.inbox.room().await;
        room.map(|room| room.send(self.parcel(content))).is_some()
    }

    fn parcel(&self, content: Content) -> Parcel {
        Parcel { epoch: self.epoch, content, replies: self.replies.clone() }
    }
}

/// `None`: the stream has ended.
fn content(heard: Option<Heard>) -> Result<Option<Content>, proto::Error> {
    let Some((message, payload)) = heard else { return Ok(None) };
    match message {
        Some(Message::Offer(offer)) => Ok(Some(Content::Offer(offer, payload))),
        Some(Message::Commit(commit)) => Ok(Some(Content::Commit(commit))),
        // A message of a kind this version does not know is a sign of life too.
        Some(Message::Heartbeat(_)) | None => Ok(Some(Content::Heartbeat)),
        Some(Message::Open(_)) => Err(proto::Error::new(ErrorCode::InvalidRequest, "a delivery opens once")),
    }
}
