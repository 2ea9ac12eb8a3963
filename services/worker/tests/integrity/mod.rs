//! Blocks that are not what they claim, between real workers: each is refused where it lands, counted, and sent again, and
//! none reaches an answer. Something between prefill and decode tampers with offers, as a broken link or driver would.

use crate::fixture::{self, *};
use handoff::digest::{Binding, bindings};
use kv::BlockHash;
use proto::{
    DeliverMessage, DeliverReply, ErrorCode, Member, Offer, deliver_message::Message, handoff_server,
};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_stream::{StreamExt, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};
use worker::Role;

const BLOCK_TOKENS: u32 = 8;

/// Sees every offer on its way and gives what goes on instead.
type Tamper = Box<dyn FnMut(Offer) -> Vec<Offer> + Send>;

/// Stands between prefill and decode.
#[derive(Clone)]
struct Between {
    decode: Member,
    tamper: Arc<Mutex<Tamper>>,
}

#[tonic::async_trait]
impl handoff_server::Handoff for Between {
    type DeliverStream = Streaming<DeliverReply>;

    async fn deliver(
        &self,
        request: Request<Streaming<DeliverMessage>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let tamper = self.tamper.clone();
        let passed = move |message: Message| match message {
            Message::Offer(offer) => {
                let offers = tamper.lock().unwrap()(offer);
                offers.into_iter().map(Message::Offer).collect()
            }
            other => vec![other],
        };
        let (sender, messages) = tokio::sync::mpsc::channel(64);
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Some(Ok(DeliverMessage { message: Some(message) })) = incoming.next().await {
                for message in passed(message) {
                    let _ = sender.send(DeliverMessage { message: Some(message) }).await;
                }
            }
        });
        let messages = tokio_stream::wrappers::ReceiverStream::new(messages);
        handoff_client(&self.decode).await.deliver(messages).await
    }
}

/// The decode member as prefill reaches it, with `tamper` on the way.
async fn behind(decode: &Member, tamper: impl FnMut(Offer) -> Vec<Offer> + Send + 'static) -> Member {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let between = Between { decode: decode.clone(), tamper: Arc::new(Mutex::new(Box::new(tamper))) };
    let service =
        handoff_server::HandoffServer::new(between).max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
    let server = handoff::transport::server().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Member { address, ..decode.clone() }
}

fn flip(mut offer: Offer, bit: usize) -> Offer {
    let mut bytes = offer.payload.to_vec();
    bytes[bit / 8] ^= 1 << (bit % 8);
    offer.payload = bytes.into();
    offer
}

async fn refused(decode: &Worker) -> u64 {
    let metrics = decode.get("/metrics").await;
    let name = "baton_handoff_blocks_refused_total{transport=\"grpc\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("{name} is missing from\n{metrics}")).parse().unwrap()
}

/// A prompt and its answer by one worker alone.
async fn asked(both: &Worker, first: u32) -> (proto::Sequence, Vec<u32>) {
    let mut prompt = long_prompt(60);
    prompt[0] = first;
    let sequence = sequence(&prompt, 12);
    let mut whole = generate(&both.member, &sequence, true).await;
    let expected = whole.rest().await.0.iter().map(|token| token.id).collect();
    (sequence, expected)
}

/// The sequence by `prefill`, reaching decode at `between`, and `decode`.
async fn answer(prefill: &Worker, between: &Member, decode: &Worker, sequence: &proto::Sequence) -> Vec<u32> {
    let mut decoding = generate(&decode.member, sequence, false).await;
    let reserved = decoding.reserved().await;
    let request = prefill_request(sequence, between, &reserved);
    let mut prefilling = fixture::prefill(&prefill.member, request).await;
    let (prefilled, (rest, _)) = tokio::join!(prefilling.end(), decoding.rest());
    prefilled.unwrap().first.into_iter().chain(rest).map(|token| token.id).collect()
}

/// `right` bytes, announced as what `other` makes of their binding.
fn announce(offer: Offer, sequence: &proto::Sequence, layout: u64, other: fn(Binding) -> Binding) -> Offer {
    let binding = bindings(&sequence.tokens, BLOCK_TOKENS, layout)[offer.index as usize];
    let digest = other(binding).seal(binding.open(offer.digest));
    Offer { digest, ..offer }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_anywhere_in_a_block_is_refused_and_the_block_sent_again() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    let (sequence, expected) = asked(&both, 3).await;
    let mut seen = 0;
    let between = behind(&decode.member, move |offer| {
        seen += 1;
        let bits = offer.payload.len() * 8;
        vec![match seen {
            1 => flip(offer, 0),
            3 => flip(offer, bits / 2),
            5 => flip(offer, bits - 1),
            _ => offer,
        }]
    });
    assert_eq!(answer(&prefill, &between.await, &decode, &sequence).await, expected);
    assert_eq!(refused(&decode).await, 3);
    let bytes = 5 * 576 * 4 * sequence.tokens.len();
    let line = format!("baton_handoff_bytes_total{{transport=\"grpc\"}} {bytes}");
    assert!(decode.get("/metrics").await.contains(&line), "what was accepted is counted once");
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_changed_places_are_refused_and_sent_again() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    // With what they were announced by, and without.
    for (round, with_digest) in [true, false].into_iter().enumerate() {
        let (sequence, expected) = asked(&both, 10 + round as u32).await;
        let (mut held, mut done) = (None, false);
        let between = behind(&decode.member, move |offer: Offer| {
            if done {
                return vec![offer];
            }
            let Some(mut first): Option<Offer> = held.take() else {
                held = Some(offer);
                return Vec::new();
            };
            let mut second = offer;
            std::mem::swap(&mut first.payload, &mut second.payload);
            if with_digest {
                std::mem::swap(&mut first.digest, &mut second.digest);
            }
            done = true;
            vec![first, second]
        });
        assert_eq!(answer(&prefill, &between.await, &decode, &sequence).await, expected);
        assert_eq!(refused(&decode).await, 2 * (round as u64 + 1));
    }
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn right_bytes_under_another_prefix_index_or_layout_are_refused() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    let others: [fn(Binding) -> Binding; 4] = [
        |right| Binding { prefix: BlockHash(right.prefix.0 ^ 1), ..right },
        |right| Binding { index: right.index + 1, ..right },
        |right| Binding { rows: right.rows - 1, ..right },
        |right| Binding { layout: right.layout ^ 1, ..right },
    ];
    for (round, other) in others.into_iter().enumerate() {
        let (sequence, expected) = asked(&both, 20 + round as u32).await;
        let (layout, mut offers) = (decode.member.layout_fingerprint, 0);
        let of = sequence.clone();
        let between = behind(&decode.member, move |offer| {
            offers += 1;
            vec![if offers == 2 { announce(offer, &of, layout, other) } else { offer }]
        });
        assert_eq!(answer(&prefill, &between.await, &decode, &sequence).await, expected);
        assert_eq!(refused(&decode).await, round as u64 + 1);
    }
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_of_an_earlier_sequence_passes_for_none_of_a_later_one() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    let kept: Arc<Mutex<Option<Offer>>> = Arc::default();
    for round in 0..2 {
        let (sequence, expected) = asked(&both, 30 + round).await;
        let (kept, mut done) = (kept.clone(), false);
        let between = behind(&decode.member, move |offer| {
            let mut kept = kept.lock().unwrap();
            // Intact, with its own digest, of the same index and rows: only the prompt before it is another.
            let replayed = if std::mem::replace(&mut done, true) || round == 0 { None } else { kept.clone() };
            if offer.index == 0 {
                kept.get_or_insert(offer.clone());
            }
            vec![replayed.unwrap_or(offer)]
        });
        assert_eq!(answer(&prefill, &between.await, &decode, &sequence).await, expected);
        assert_eq!(refused(&decode).await, u64::from(round));
    }
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_way_that_damages_every_time_fails_with_the_cause_and_another_prefill_goes_on() {
    let cluster = Cluster::start().await;
    let [prefill, decode, both] = cluster.workers([Role::Prefill, Role::Decode, Role::Both]).await;
    let (sequence, expected) = asked(&both, 40).await;
    let between =
        behind(&decode.member, |offer| vec![if offer.index == 2 { flip(offer, 9) } else { offer }]).await;
    let mut decoding = generate(&decode.member, &sequence, false).await;
    let reserved = decoding.reserved().await;
    let request = prefill_request(&sequence, &between, &reserved);
    let error =
        fixture::prefill(&prefill.member, request).await.end().await.expect_err("it cannot be delivered");
    assert_eq!(error.code(), ErrorCode::Digest, "{error}");
    for part in ["block 2 as often as allowed", "damaged on the way"] {
        assert!(error.message.contains(part), "{error}");
    }
    let advanced =
        decoding.advance(reserved.reservation, reserved.epoch).await.expect("one block is missing");
    assert!(!advanced.accepted.contains(&2) && advanced.accepted.contains(&0), "{advanced:?}");
    let request = proto::PrefillRequest {
        epoch: advanced.epoch,
        blocks_accepted: advanced.accepted,
        ..prefill_request(&sequence, &decode.member, &reserved)
    };
    let mut prefilling = fixture::prefill(&prefill.member, request).await;
    let (prefilled, (rest, _)) = tokio::join!(prefilling.end(), decoding.rest());
    let answer: Vec<_> = prefilled.unwrap().first.into_iter().chain(rest).map(|token| token.id).collect();
    assert_eq!(answer, expected);
    assert_eq!(refused(&decode).await, 3, "once for each time that it may be offered");
    for worker in [prefill, decode, both] {
        worker.assert_idle().await;
    }
}
