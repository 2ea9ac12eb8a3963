//! The worker's end of a `Handoff.Deliver` call, taken apart here so that a payload stays in the pieces in which the connection
//! read it, and is copied once, into its block: tonic's decoder would first copy each into a buffer of its own. Whoever sends
//! may be any gRPC client; a payload that does not come as an offer's last field is only slower.

use crate::framing::{OFFER, PAYLOAD, PREFIX};
use bytes::{Buf, Bytes};
use http_body_util::BodyExt;
use kv::Pieces;
use prost::{
    DecodeError, Message as _,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use proto::{DeliverMessage, ErrorCode, Offer, deliver_message::Message};
use std::collections::VecDeque;
use tonic::body::Body;

/// Of an offer's bytes: enough for every field before the payload.
const HEAD: usize = 128;
/// Neighbours that are no longer than this together are copied into one piece.
const SMALL: usize = 512;

/// A message, and the payload of an offer, which is empty in the message itself.
pub(crate) type Heard = (Option<Message>, Pieces);

/// What a call's body says, message by message.
pub struct Messages {
    body: Body,
    /// Read and not yet understood.
    ahead: Ahead,
}

impl Messages {
    pub fn new(body: Body) -> Self {
        Messages { body, ahead: Ahead::default() }
    }

    /// The next one; `None` at the end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Heard>, proto::Error> {
        loop {
            if let Some(pieces) = self.ahead.message()? {
                return heard(pieces).map(Some).map_err(|error| broken(&error.to_string()));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.ahead.extend(frame.into_data().ok()),
                Some(Err(status)) => return Err(proto::Error::from(status)),
                None if self.ahead.length == 0 => return Ok(None),
                None => return Err(broken("it ends within a message")),
            }
        }
    }
}

fn broken(why: &str) -> proto::Error {
    proto::Error::new(ErrorCode::InvalidRequest, format!("the delivery cannot be understood: {why}"))
}

/// Pieces of the body in their order.
#[derive(Default)]
struct Ahead {
    pieces: VecDeque<Bytes>,
    length: usize,
}

impl Ahead {
    /// Small pieces are joined: what a peer may make wait here is bounded in bytes, and so are the pieces.
    fn extend(&mut self, piece: Option<Bytes>) {
        let piece = piece.unwrap_or_default();
        self.length += piece.len();
        match self.pieces.pop_back() {
            Some(last) if last.len() + piece.len() <= SMALL => {
                self.pieces.push_back([&last[..], &piece[..]].concat().into());
            }
            last => self.pieces.extend(last.into_iter().chain([piece])),
        }
    }

    /// The next message if all of it is here.
    fn message(&mut self) -> Result<Option<Pieces>, proto::Error> {
        if self.length < PREFIX {
            return Ok(None);
        }
        let mut prefix = [0; PREFIX];
        self.peek(&mut prefix);
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if prefix[0] != 0 {
            return Err(broken("its messages are compressed, which is not served"));
        }
        if length > proto::MAX_MESSAGE_BYTES {
            let most = proto::MAX_MESSAGE_BYTES;
            return Err(broken(&format!("a message has {length} bytes, at most {most} are taken")));
        }
        if self.length < PREFIX + length {
            return Ok(None);
        }
        self.take(PREFIX);
        Ok(Some(self.take(length)))
    }

    fn peek(&self, to: &mut [u8]) {
        let bytes = self.pieces.iter().flat_map(|piece| piece.iter());
        to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
    }

    fn take(&mut self, count: usize) -> Pieces {
        self.length -= count;
        cut(&mut self.pieces, count).into_iter().collect()
    }
}

/// Takes the first `count` bytes off.
fn cut(pieces: &mut VecDeque<Bytes>, mut count: usize) -> Vec<Bytes> {
    let mut taken = Vec::new();
    while let Some(mut first) = pieces.pop_front() {
        if first.len() > count {
            taken.push(first.split_to(count));
            pieces.push_front(first);
            break;
        }
        count -= first.len();
        taken.push(first);
    }
    taken
}

fn heard(message: Pieces) -> Result<Heard, DecodeError> {
    let length = message.len();
    let mut head = [0; HEAD];
    let head = &mut head[..length.min(HEAD)];
    message.reader().copy_to_slice(head);
    if let Some((offer, at)) = payload_last(head, length)? {
        return Ok((Some(Message::Offer(offer)), message.after(at)));
    }
    let mut message = DeliverMessage::decode(message.together())?.message;
    let payload = match &mut message {
        Some(Message::Offer(offer)) => std::mem::take(&mut offer.payload),
        _ => Bytes::new(),
    };
    Ok((message, payload.into()))
}

/// An offer whose payload is the rest of the message of `length` bytes that begins with `head`: its other fields, and where
/// the payload begins. `None`: another message, or another order of fields.
fn payload_last(head: &[u8], length: usize) -> Result<Option<(Offer, usize)>, DecodeError> {
    let mut rest = head;
    let at = |rest: &[u8]| head.len() - rest.len();
    if !matches!(decode_key(&mut rest), Ok((OFFER, WireType::LengthDelimited))) {
        return Ok(None);
    }
    let Ok(inner) = decode_varint(&mut rest) else { return Ok(None) };
    let begin = at(rest);
    if length.checked_sub(begin).map(|rest| rest as u64) != Some(inner) {
        return Ok(None);
    }
    loop {
        let fields = &head[begin..at(rest)];
        match decode_key(&mut rest) {
            Ok((PAYLOAD, WireType::LengthDelimited)) => {
                let Ok(payload) = decode_varint(&mut rest) else { return Ok(None) };
                let last = length.checked_sub(at(rest)).map(|rest| rest as u64) == Some(payload);
                return last.then(|| Offer::decode(fields).map(|offer| (offer, at(rest)))).transpose();
            }
            Ok((tag, wire)) if skip_field(wire, tag, &mut rest, DecodeContext::default()).is_ok() => {}
            _ => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;
    use std::convert::Infallible;

    fn offer(payload: usize) -> Offer {
        let payload = (0..payload).map(|i| (i * 7) as u8).collect();
        Offer { index: 300, rows: 64, digest: u64::MAX, payload, address: None }
    }

    fn message(message: Message) -> Vec<u8> {
        let bytes = DeliverMessage { message: Some(message) }.encode_to_vec();
        [&[0][..], &(bytes.len() as u32).to_be_bytes(), &bytes].concat()
    }

    fn messages(bytes: &[u8], piece: usize) -> Messages {
        let pieces: Vec<_> = bytes.chunks(piece).map(Bytes::copy_from_slice).collect();
        let frames = pieces.into_iter().map(|piece| Ok::<_, Infallible>(http_body::Frame::data(piece)));
        Messages::new(Body::new(StreamBody::new(tokio_stream::iter(frames))))
    }

    async fn told(bytes: &[u8], piece: usize) -> Result<Vec<Message>, proto::Error> {
        let (mut messages, mut told) = (messages(bytes, piece), Vec::new());
        while let Some((message, payload)) = messages.next().await? {
            told.extend(message.map(|message| match message {
                Message::Offer(offer) => Message::Offer(Offer { payload: payload.together(), ..offer }),
                other => other,
            }));
        }
        Ok(told)
    }

    #[tokio::test]
    async fn what_any_client_says_is_understood_however_it_is_cut() {
        let beat = Message::Heartbeat(proto::Heartbeat { step: 7, ..Default::default() });
        let at = Offer { address: Some(77), ..offer(0) };
        let said = [beat, Message::Offer(offer(1)), Message::Offer(at), Message::Offer(offer(20_000))];
        let bytes: Vec<u8> = said.iter().cloned().flat_map(message).collect();
        for piece in [1, 2, 6, 100, 16_384, 100_000] {
            assert_eq!(told(&bytes, piece).await.unwrap(), said, "in pieces of {piece}");
        }
    }

    #[tokio::test]
    async fn a_payload_before_other_fields_is_understood_too() {
        let (whole, mut moved) = (offer(500), offer(500));
        moved.payload = Bytes::new();
        let payload = Offer { payload: whole.payload.clone(), ..Offer::default() }.encode_to_vec();
        let fields = [payload, moved.encode_to_vec()].concat();
        let mut bytes = vec![(OFFER << 3 | 2) as u8];
        prost::encoding::encode_varint(fields.len() as u64, &mut bytes);
        let bytes = [bytes, fields].concat();
        let framed = [&[0][..], &(bytes.len() as u32).to_be_bytes(), &bytes].concat();
        assert_eq!(told(&framed, 99).await.unwrap(), [Message::Offer(whole)]);
    }

    #[tokio::test]
    async fn a_payload_is_not_copied() {
        let bytes = Bytes::from(message(Message::Offer(offer(100_000))));
        let frame = Ok::<_, Infallible>(http_body::Frame::data(bytes.clone()));
        let mut messages = Messages::new(Body::new(StreamBody::new(tokio_stream::iter([frame]))));
        let (_, payload) = messages.next().await.unwrap().unwrap();
        let begin = payload.iter().find(|piece| !piece.is_empty()).unwrap().as_ptr();
        assert!(bytes.as_ptr_range().contains(&begin));
    }

    #[tokio::test]
    async fn what_cannot_be_a_delivery_is_told() {
        let whole = message(Message::Offer(offer(1000)));
        let mut long = whole.clone();
        long[1] = 0xff;
        let compressed = [&[1][..], &whole[1..]].concat();
        let nonsense = [0, 0, 0, 0, 3, 0x12, 0x7f, 0xff];
        for (bytes, why) in [
            (&whole[..500], "ends within"),
            (&long[..], "at most"),
            (&compressed[..], "compressed"),
            (&nonsense[..], "cannot be understood"),
        ] {
            let error = told(bytes, 64).await.unwrap_err();
            assert!(error.message.contains(why), "{}", error.message);
        }
    }
}
