//! Deliveries over real sockets between memories that stand for two workers' pools.

use bytes::Bytes;
use handoff::{
    Error, Patience,
    deliver::{Delivery, Options, Order, Progress, Sent},
    digest::{Binding, bindings},
    receive::{Inbox, Incoming, Outcome, Plan},
    receiver::Answer,
    serve, transport,
};
use kv::{BlockId, Digest, KvDtype, KvError, KvLayout, KvMemory, Payload, StepId, Transfer};
use proto::{ErrorCode, handoff_server::HandoffServer};
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::TcpListener, sync::oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};

const LAYOUT: KvLayout = KvLayout { dtype: KvDtype::F32, layers: 3, block_tokens: 4, row: 100 };
const RESERVATION: u64 = 77;
const WEIGHTS: u64 = 5;
const TOKENS: u32 = 30;

/// Blocks that know what was written into them.
#[derive(Default)]
struct Memory {
    blocks: Mutex<HashMap<BlockId, Bytes>>,
    /// Blocks whose next write fails.
    broken: Mutex<HashSet<BlockId>>,
    /// Blocks in whose next write a bit flips.
    flaky: Mutex<HashSet<BlockId>>,
    /// Blocks whose writes wait for [`Memory::land`].
    slow: Mutex<HashSet<BlockId>>,
    waiting: Mutex<Vec<oneshot::Sender<Result<(), KvError>>>>,
    /// Writes so far, by block.
    writes: Mutex<HashMap<BlockId, u32>>,
}

impl KvMemory for Memory {
    fn layout(&self) -> KvLayout {
        LAYOUT
    }

    fn blocks(&self) -> u32 {
        64
    }

    fn read(&self, block: BlockId, rows: u32, _: StepId) -> Transfer<Payload> {
        let content = self.blocks.lock().unwrap().get(&block).cloned();
        assert_eq!(content.as_ref().map(Bytes::len), Some(LAYOUT.payload_bytes(rows)));
        done(content.map(Payload::new).ok_or_else(|| KvError::Stopped("never written".into())))
    }

    fn write(&self, block: BlockId, _: u32, payload: Payload, _: StepId) -> Transfer<()> {
        *self.writes.lock().unwrap().entry(block).or_default() += 1;
        if self.broken.lock().unwrap().remove(&block) {
            return done(Err(KvError::Stopped("a bad cell".into())));
        }
        let mut landed = payload.bytes.to_vec();
        landed[17] ^= u8::from(self.flaky.lock().unwrap().remove(&block));
        let intact = Digest::of(&landed).expect(payload.digest);
        if intact.is_err() {
            return done(intact);
        }
        self.blocks.lock().unwrap().insert(block, landed.into());
        if self.slow.lock().unwrap().contains(&block) {
            let (sender, receiver) = oneshot::channel();
            self.waiting.lock().unwrap().push(sender);
            return receiver;
        }
        done(Ok(()))
    }
}

impl Memory {
    fn land(&self) {
        for waiting in self.waiting.lock().unwrap().drain(..) {
            let _ = waiting.send(Ok(()));
        }
    }
}

fn done<T>(result: Result<T, KvError>) -> Transfer<T> {
    let (sender, receiver) = oneshot::channel();
    let _ = sender.send(result);
    receiver
}

fn tokens() -> Vec<u32> {
    (0..TOKENS).collect()
}

fn rows(index: u32) -> u32 {
    (TOKENS - index * LAYOUT.block_tokens).min(LAYOUT.block_tokens)
}

fn blocks() -> u32 {
    TOKENS.div_ceil(LAYOUT.block_tokens)
}

fn content(index: u32) -> Bytes {
    (0..LAYOUT.payload_bytes(rows(index))).map(|i| (i as u32 * 7 + index) as u8).collect()
}

/// A prefill worker's pool with the sequence in blocks 40, 39, …
fn source() -> Arc<Memory> {
    let memory = Memory::default();
    memory.blocks.lock().unwrap().extend((0..blocks()).map(|index| (40 - index, content(index))));
    Arc::new(memory)
}

#[derive(Clone, Default)]
struct Table(Arc<Mutex<Option<Inbox>>>);

impl serve::Reservations for Table {
    fn inbox(&self, reservation: u64) -> Option<Inbox> {
        self.0.lock().unwrap().clone().filter(|_| reservation == RESERVATION)
    }

    fn heartbeat(&self) -> proto::Heartbeat {
        proto::Heartbeat::default()
    }
}

#[tonic::async_trait]
impl proto::handoff_server::Handoff for Table {
    type DeliverStream = ReceiverStream<Result<proto::DeliverReply, Status>>;

    async fn deliver(
        &self,
        request: Request<Streaming<proto::DeliverMessage>>,
    ) -> Result<Response<Self::DeliverStream>, Status> {
        let (beat, silence) = (Duration::from_millis(50), Duration::from_secs(5));
        Ok(Response::new(serve::serve(request.into_inner(), Arc::new(self.clone()), beat, silence)))
    }
}

/// A decode worker with one reservation: block `index` goes to pool block `index + 1`.
struct Decode {
    memory: Arc<Memory>,
    incoming: Incoming,
    address: String,
}

impl Decode {
    async fn start(present: u32, delivery_patience: Duration) -> Self {
        let memory = Arc::new(Memory::default());
        let plan = Plan {
            blocks: (1..=blocks()).collect(),
            bindings: bindings(&tokens(), LAYOUT.block_tokens, LAYOUT.fingerprint()),
            present,
            weights_fingerprint: WEIGHTS,
            patience: Patience {
                silence: Duration::from_secs(5),
                delivery: delivery_patience,
                landing: LANDING,
            },
        };
        let (incoming, inbox) = Incoming::new(plan, memory.clone(), || 0);
        let table = Table(Arc::new(Mutex::new(Some(inbox))));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let service = HandoffServer::new(table).max_decoding_message_size(proto::MAX_MESSAGE_BYTES);
        tokio::spawn(
            transport::server().add_service(service).serve_with_incoming(transport::incoming(listener)),
        );
        Decode { memory, incoming, address }
    }

    fn assert_filled(&self, from: u32) {
        let found = self.memory.blocks.lock().unwrap();
        for index in from..blocks() {
            assert_eq!(found.get(&(index + 1)), Some(&content(index)), "block {index}");
        }
        assert_eq!(found.len() as u32, blocks() - from, "blocks that were present are not sent");
    }
}

fn order(decode: &Decode) -> Order {
    Order {
        reservation: RESERVATION,
        epoch: 1,
        address: decode.address.clone(),
        member: "prefill".into(),
        weights_fingerprint: WEIGHTS,
        bindings: bindings(&tokens(), LAYOUT.block_tokens, LAYOUT.fingerprint()),
        present: 0,
        accepted: Vec::new(),
    }
}

fn open(order: Order) -> Delivery {
    let channel = transport::channel(&proto::Dial::default(), &order.address).unwrap();
    let options = Options { window_bytes: 2 * LAYOUT.block_bytes(), ..Options::default() };
    Delivery::open(channel, order, source(), Box::new(proto::Heartbeat::default), options, MetadataMap::new())
}

fn commit() -> proto::Commit {
    let first_token = Some(proto::Token { id: 9, position: TOKENS, ..Default::default() });
    proto::Commit { first_token, ..Default::default() }
}

/// Computes everything at once and drives to the end; what was released.
async fn deliver(delivery: Delivery) -> (Result<Sent, Error>, Vec<u32>) {
    deliver_with(delivery, commit()).await
}

async fn deliver_with(mut delivery: Delivery, commit: proto::Commit) -> (Result<Sent, Error>, Vec<u32>) {
    for index in 0..blocks() {
        delivery.computed(index, 40 - index, 1);
    }
    delivery.first_token(commit);
    let mut released = Vec::new();
    loop {
        match delivery.next().await {
            Ok(Progress::Release(index)) => released.push(index),
            Ok(Progress::Done(sent)) => return (Ok(sent), released),
            Err(error) => return (Err(error), released),
        }
    }
}

const LONG: Duration = Duration::from_secs(20);
const LANDING: Duration = Duration::from_millis(100);

#[tokio::test]
async fn blocks_arrive_where_they_belong_and_are_released_once() {
    let mut decode = Decode::start(2, LONG).await;
    let delivery = deliver(open(Order { present: 2, ..order(&decode) }));
    let ((sent, mut released), outcome) = tokio::join!(delivery, decode.incoming.run());
    let payload: usize = (2..blocks()).map(|index| content(index).len()).sum();
    assert_eq!(sent.unwrap(), Sent { bytes: payload as u64, blocks: blocks() - 2 });
    assert!(matches!(outcome, Outcome::Complete(found) if found == commit()));
    released.sort_unstable();
    assert_eq!(released, (0..blocks()).collect::<Vec<_>>());
    decode.assert_filled(2);
    let received = decode.incoming.received();
    assert_eq!((received.bytes, received.blocks, received.refused), (payload as u64, blocks() - 2, 0));
    assert_eq!(decode.incoming.advance(1), Answer::AlreadyComplete);
    assert!(decode.incoming.close().is_none());
}

#[tokio::test]
async fn a_block_that_could_not_be_kept_is_sent_again() {
    let mut decode = Decode::start(0, LONG).await;
    decode.memory.broken.lock().unwrap().extend([3, 7]);
    let ((sent, _), outcome) = tokio::join!(deliver(open(order(&decode))), decode.incoming.run());
    assert_eq!(sent.unwrap().blocks, blocks());
    assert!(matches!(outcome, Outcome::Complete(_)));
    decode.assert_filled(0);
    let writes = decode.memory.writes.lock().unwrap();
    assert!((1..=blocks()).all(|block| writes[&block] == if [3, 7].contains(&block) { 2 } else { 1 }));
}

#[tokio::test]
async fn a_block_in_which_a_bit_flipped_is_sent_again() {
    let mut decode = Decode::start(0, LONG).await;
    decode.memory.flaky.lock().unwrap().insert(5);
    let ((sent, _), outcome) = tokio::join!(deliver(open(order(&decode))), decode.incoming.run());
    assert_eq!(sent.unwrap().blocks, blocks());
    assert!(matches!(outcome, Outcome::Complete(_)));
    decode.assert_filled(0);
    assert_eq!((decode.incoming.received().refused, decode.memory.writes.lock().unwrap()[&5]), (1, 2));
}

/// Delivers what is announced under `bindings`: refused as often as it is tried, and nothing is kept.
async fn assert_refused(bindings: Vec<Binding>, wrong: &[u32]) {
    let mut decode = Decode::start(0, LONG).await;
    let order = Order { bindings, ..order(&decode) };
    let error = tokio::select! {
        (result, released) = deliver(open(order)) => {
            assert!(wrong.iter().all(|index| !released.contains(index)), "{released:?}");
            result.expect_err("must be refused")
        }
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
    };
    assert_eq!(error.code(), ErrorCode::Digest, "{error}");
    assert!(error.to_string().contains("of another prefix or place"), "{error}");
    let kept = decode.memory.blocks.lock().unwrap();
    assert!(wrong.iter().all(|index| !kept.contains_key(&(index + 1))), "{kept:?}");
    assert!(decode.incoming.received().refused >= Options::default().tries);
}

#[tokio::test]
async fn blocks_of_another_prefix_are_refused() {
    let mut other = tokens();
    other[1] = 1000;
    let all: Vec<u32> = (0..blocks()).collect();
    assert_refused(bindings(&other, LAYOUT.block_tokens, LAYOUT.fingerprint()), &all).await;
}

#[tokio::test]
async fn blocks_that_changed_places_are_refused() {
    let mut swapped = bindings(&tokens(), LAYOUT.block_tokens, LAYOUT.fingerprint());
    swapped.swap(2, 4);
    assert_refused(swapped, &[2, 4]).await;
}

#[tokio::test]
async fn who_does_not_match_is_told_why() {
    let mut decode = Decode::start(0, LONG).await;
    for (order, code, part) in [
        (
            Order { weights_fingerprint: 6, ..order(&decode) },
            ErrorCode::Mismatch,
            "weights of prefill member prefill",
        ),
        (Order { reservation: 1, ..order(&decode) }, ErrorCode::UnknownReservation, "no reservation 1"),
        (Order { epoch: 0, ..order(&decode) }, ErrorCode::StaleEpoch, "epoch 1 owns"),
        (
            Order { address: "http://127.0.0.1:1".into(), ..order(&decode) },
            ErrorCode::WorkerLost,
            "http://127.0.0.1:1 cannot be reached",
        ),
    ] {
        let error = tokio::select! {
            (result, _) = deliver(open(order)) => result.expect_err("must be refused"),
            outcome = decode.incoming.run() => panic!("{outcome:?}"),
        };
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(decode.memory.writes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_next_epoch_keeps_what_was_accepted_and_fences_the_old() {
    let mut decode = Decode::start(0, LONG).await;
    let mut old = open(order(&decode));
    for index in 0..3 {
        old.computed(index, 40 - index, 1);
    }
    let mut released = 0;
    while released < 3 {
        tokio::select! {
            progress = old.next() => match progress.unwrap() {
                Progress::Release(_) => released += 1,
                Progress::Done(_) => panic!("not everything was sent"),
            },
            outcome = decode.incoming.run() => panic!("{outcome:?}"),
        }
    }
    let Answer::Advanced { epoch: 2, accepted } = decode.incoming.advance(1) else { panic!("no new epoch") };
    assert_eq!(accepted, [0, 1, 2]);
    let new = open(Order { epoch: 2, accepted, ..order(&decode) });
    let (old, (sent, _), outcome) = tokio::join!(old.next(), deliver(new), decode.incoming.run());
    assert_eq!(old.expect_err("fenced").code(), ErrorCode::StaleEpoch);
    assert_eq!(sent.unwrap().blocks, blocks() - 3);
    assert!(matches!(outcome, Outcome::Complete(_)));
    decode.assert_filled(0);
    assert!(decode.memory.writes.lock().unwrap().values().all(|writes| *writes == 1));
}

#[tokio::test]
async fn a_prefill_that_leaves_is_waited_for_only_so_long() {
    let mut decode = Decode::start(0, Duration::from_millis(300)).await;
    let mut delivery = open(order(&decode));
    delivery.computed(0, 40, 1);
    tokio::select! {
        progress = delivery.next() => assert_eq!(progress.unwrap(), Progress::Release(0)),
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
    }
    drop(delivery);
    assert!(matches!(decode.incoming.run().await, Outcome::Expired));
    assert!(decode.incoming.close().is_none(), "nothing is being written");
}

#[tokio::test]
async fn a_reservation_that_ends_under_a_write_says_so_until_the_write_has_landed() {
    let mut decode = Decode::start(0, LONG).await;
    decode.memory.slow.lock().unwrap().extend([2, 5]);
    let delivery = tokio::spawn(deliver(open(order(&decode))));
    while decode.memory.waiting.lock().unwrap().len() < 2 {
        tokio::select! {
            outcome = decode.incoming.run() => panic!("{outcome:?}"),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    let unsettled = decode.incoming.close().expect("two writes are in flight");
    assert_eq!(unsettled.writing(), [1, 4]);
    let error = delivery.await.unwrap().0.expect_err("the reservation has ended");
    assert_eq!(error.code(), ErrorCode::Cancelled, "{error}");
    let settled = tokio::spawn(unsettled.settle());
    tokio::time::sleep(3 * LANDING).await;
    assert!(!settled.is_finished(), "nothing has landed");
    decode.memory.land();
    assert_eq!(settled.await.unwrap(), 2, "both were overdue, and counted");
}

#[tokio::test]
async fn a_commit_counts_for_its_own_epoch_only() {
    let mut decode = Decode::start(0, LONG).await;
    // The last block does not land, so that the old epoch commits and stays incomplete.
    decode.memory.slow.lock().unwrap().insert(blocks());
    let old = tokio::spawn(deliver(open(order(&decode))));
    tokio::select! {
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
        () = tokio::time::sleep(Duration::from_millis(200)) => {}
    }
    let Answer::Advanced { epoch: 2, accepted } = decode.incoming.advance(1) else { panic!("no new epoch") };
    assert_eq!(accepted.len() as u32, blocks() - 1);
    let mut other = commit();
    other.first_token.as_mut().unwrap().id = 10;
    let new = tokio::spawn(deliver_with(open(Order { epoch: 2, ..order(&decode) }), other.clone()));
    tokio::select! {
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
        () = tokio::time::sleep(Duration::from_millis(200)) => {}
    }
    decode.memory.land();
    let outcome = decode.incoming.run().await;
    assert!(matches!(&outcome, Outcome::Complete(found) if *found == other), "{outcome:?}");
    let (sent, _) = new.await.unwrap();
    assert_eq!(sent.unwrap().blocks, blocks(), "what is here already is answered");
    assert!(
        decode.memory.writes.lock().unwrap().values().all(|writes| *writes == 1),
        "and not written again"
    );
    decode.assert_filled(0);
    assert_eq!(old.await.unwrap().0.expect_err("fenced").code(), ErrorCode::StaleEpoch);
}
