//! The client's end of a `Handoff.Deliver` call, framed here so that a payload goes from the memory it was read into straight
//! to the socket: tonic's encoder would copy each one into a buffer of its own. On the wire it is the same gRPC, and the same
//! protobuf with the payload as an offer's last field.

use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt, future::poll_fn, stream};
use http::{HeaderValue, Method, Request, header::CONTENT_TYPE, header::TE};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};
use proto::{DeliverMessage, DeliverReply, Offer, deliver_message::Message};
use std::convert::Infallible;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    body::Body,
    codec::Codec,
    metadata::MetadataMap,
    transport::{Channel, channel::ResponseFuture},
};
use tonic_prost::ProstCodec;
use tower_service::Service;

const PATH: &str = "/baton.v1.Handoff/Deliver";
/// Field numbers of handoff.proto.
pub(crate) const OFFER: u32 = 2;
pub(crate) const PAYLOAD: u32 = 4;
/// A flag, which says that nothing is compressed, and the length.
pub(crate) const PREFIX: usize = 5;

/// Opens the call; `messages` go out as they come, `trace` with the call.
pub async fn deliver(
    mut channel: Channel,
    messages: mpsc::Receiver<DeliverMessage>,
    trace: MetadataMap,
) -> Result<Streaming<DeliverReply>, Status> {
    poll_fn(|context| channel.poll_ready(context)).await.map_err(unreached)?;
    let answered: ResponseFuture = channel.call(request(messages, trace));
    let (head, body) = answered.await.map_err(unreached)?.into_parts();
    // An error before any message comes in the headers.
    if let Some(status) = Status::from_header_map(&head.headers).filter(|status| status.code() != Code::Ok) {
        return Err(status);
    }
    let decoder = ProstCodec::<DeliverMessage, DeliverReply>::default().decoder();
    Ok(Streaming::new_response(decoder, body, head.status, None, Some(proto::MAX_MESSAGE_BYTES)))
}

fn unreached(error: tonic::transport::Error) -> Status {
    Status::from_error(error.into())
}

fn request(messages: mpsc::Receiver<DeliverMessage>, trace: MetadataMap) -> Request<Body> {
    let pieces = ReceiverStream::new(messages).flat_map(|message| stream::iter(encode(message)));
    let body = StreamBody::new(pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece))));
    let mut request = Request::new(Body::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static(PATH);
    *request.headers_mut() = trace.into_headers();
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request
}

/// One gRPC message, the payload in a piece of its own.
fn encode(mut message: DeliverMessage) -> impl Iterator<Item = Bytes> {
    let payload = match &mut message.message {
        Some(Message::Offer(offer)) => std::mem::take(&mut offer.payload),
        _ => Bytes::new(),
    };
    let head = match &message.message {
        Some(Message::Offer(offer)) if !payload.is_empty() => before_payload(offer, payload.len()),
        _ => message.encode_to_vec(),
    };
    let length = (head.len() + payload.len()) as u32;
    let mut framed = BytesMut::with_capacity(PREFIX + head.len());
    framed.put_u8(0);
    framed.put_u32(length);
    framed.put_slice(&head);
    [framed.freeze(), payload].into_iter().filter(|piece| !piece.is_empty())
}

/// `DeliverMessage{offer}` up to where the payload's bytes begin.
fn before_payload(offer: &Offer, payload: usize) -> Vec<u8> {
    let mut fields = offer.encode_to_vec();
    encode_key(PAYLOAD, WireType::LengthDelimited, &mut fields);
    encode_varint(payload as u64, &mut fields);
    let mut head = Vec::with_capacity(fields.len() + 2 * PREFIX);
    encode_key(OFFER, WireType::LengthDelimited, &mut head);
    encode_varint((fields.len() + payload) as u64, &mut head);
    head.extend_from_slice(&fields);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a peer decodes that knows nothing of this file.
    fn decoded(message: DeliverMessage) -> DeliverMessage {
        let bytes: Vec<u8> = encode(message).flatten().collect();
        assert_eq!(bytes[0], 0);
        let length = u32::from_be_bytes(bytes[1..PREFIX].try_into().unwrap());
        assert_eq!(bytes.len(), PREFIX + length as usize);
        DeliverMessage::decode(&bytes[PREFIX..]).unwrap()
    }

    #[test]
    fn it_is_the_same_protobuf() {
        for bytes in [0, 1, 127, 128, 100_000] {
            let payload = (0..bytes).map(|i| i as u8).collect();
            let offer = Offer { index: 300, rows: 64, digest: u64::MAX, payload, ..Default::default() };
            let message = DeliverMessage { message: Some(Message::Offer(offer)) };
            assert_eq!(decoded(message.clone()), message, "{bytes} bytes");
        }
        let beat = Message::Heartbeat(proto::Heartbeat { step: 7, ..Default::default() });
        for message in [Some(beat), None] {
            let message = DeliverMessage { message };
            assert_eq!(decoded(message.clone()), message);
        }
    }

    #[test]
    fn a_payload_is_not_copied() {
        let payload = Bytes::from(vec![7; 1000]);
        let offer = Offer { index: 1, rows: 1, digest: 1, payload: payload.clone(), ..Default::default() };
        let last = encode(DeliverMessage { message: Some(Message::Offer(offer)) }).last().unwrap();
        assert_eq!(last.as_ptr(), payload.as_ptr());
    }
}
