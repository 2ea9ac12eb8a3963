//! Deliveries over real sockets between memories that stand for two workers' pools, the same over every transport of bytes.

mod memory;
mod over;
mod stopped;

use bytes::Bytes;
use handoff::{
    Error, Patience,
    deliver::{Delivery, Options, Order, Progress, Sent},
    digest::{Binding, bindings},
    direct::Pool,
    receive::{Inbox, Incoming, Outcome, Plan, Unsettled},
    receiver::Answer,
    serve::{HandoffServer, Reservations},
    transport,
};
use memory::{LAYOUT, Memory};
use over::{Copies, Over};
use proto::ErrorCode;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::metadata::MetadataMap;

const RESERVATION: u64 = 77;
const WEIGHTS: u64 = 5;
const TOKENS: u32 = 30;

/// BATON_SLOW times as long, for machines that are that much slower: emulated ones.
fn slowed(duration: Duration) -> Duration {
    let times = std::env::var("BATON_SLOW").map_or(1, |times| times.parse().expect("BATON_SLOW is a number"));
    duration * times
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
    let memory = Memory::new();
    (0..blocks()).for_each(|index| memory.put(40 - index, rows(index), &content(index)));
    Arc::new(memory)
}

#[derive(Clone, Default)]
struct Table(Arc<Mutex<Option<Inbox>>>);

impl Reservations for Table {
    fn inbox(&self, reservation: u64) -> Option<Inbox> {
        self.0.lock().unwrap().clone().filter(|_| reservation == RESERVATION)
    }

    fn heartbeat(&self) -> proto::Heartbeat {
        proto::Heartbeat::default()
    }

    fn heartbeat_every(&self) -> Duration {
        Duration::from_millis(50)
    }

    fn silence(&self) -> Duration {
        Duration::from_secs(5)
    }
}

/// A decode worker with one reservation: block `index` goes to pool block `index + 1`.
struct Decode {
    over: Over,
    memory: Arc<Memory>,
    incoming: Incoming,
    address: String,
}

impl Decode {
    async fn start(over: Over, present: u32, delivery_patience: Duration) -> Self {
        let memory = Arc::new(Memory::new());
        let pool = over.pool(memory.clone());
        Decode::on(over, pool, memory, present, delivery_patience).await
    }

    async fn on(
        over: Over,
        pool: Pool,
        memory: Arc<Memory>,
        present: u32,
        delivery_patience: Duration,
    ) -> Self {
        let plan = Plan {
            blocks: (1..=blocks()).collect(),
            bindings: bindings(&tokens(), LAYOUT.block_tokens, LAYOUT.fingerprint()),
            present,
            weights_fingerprint: WEIGHTS,
            patience: Patience {
                silence: slowed(Duration::from_secs(5)),
                delivery: delivery_patience,
                landing: over.landing(),
            },
        };
        let (incoming, inbox) = Incoming::new(plan, pool, || 0);
        let table = Table(Arc::new(Mutex::new(Some(inbox))));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let service = HandoffServer::new(Arc::new(table));
        tokio::spawn(
            transport::server().add_service(service).serve_with_incoming(transport::incoming(listener)),
        );
        Decode { over, memory, incoming, address }
    }

    async fn receive_a_little(&mut self) {
        tokio::select! {
            outcome = self.incoming.run() => panic!("{outcome:?}"),
            () = tokio::time::sleep(slowed(Duration::from_millis(5))) => {}
        }
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
    order_to(&decode.address)
}

fn order_to(address: &str) -> Order {
    Order {
        reservation: RESERVATION,
        epoch: 1,
        address: address.to_owned(),
        member: "prefill".into(),
        weights_fingerprint: WEIGHTS,
        bindings: bindings(&tokens(), LAYOUT.block_tokens, LAYOUT.fingerprint()),
        present: 0,
        accepted: Vec::new(),
    }
}

impl Decode {
    /// A delivery over the same transport.
    fn open(&self, order: Order) -> Delivery {
        open_with(self.over.pool(source()), order)
    }
}

fn open_with(pool: Pool, order: Order) -> Delivery {
    let channel = transport::channel(&proto::Dial::default(), &order.address).unwrap();
    let options = Options { window_bytes: 2 * LAYOUT.block_bytes(), ..Options::default() };
    Delivery::open(channel, order, pool, Box::new(proto::Heartbeat::default), options, MetadataMap::new())
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

over_each!(
    chunks_travel_while_later_ones_compute,
    blocks_arrive_where_they_belong_and_are_released_once,
    a_block_that_could_not_be_kept_is_sent_again,
    a_block_in_which_a_bit_flipped_is_sent_again,
    blocks_of_another_prefix_are_refused,
    blocks_that_changed_places_are_refused,
    who_does_not_match_is_told_why,
    the_next_epoch_keeps_what_was_accepted_and_fences_the_old,
    a_prefill_that_leaves_is_waited_for_only_so_long,
    a_reservation_that_ends_under_a_write_says_so_until_the_write_has_landed,
    a_commit_counts_for_its_own_epoch_only,
);

fn long() -> Duration {
    slowed(Duration::from_secs(20))
}

async fn blocks_arrive_where_they_belong_and_are_released_once(over: Over) {
    let mut decode = Decode::start(over, 2, long()).await;
    let delivery = deliver(decode.open(Order { present: 2, ..order(&decode) }));
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

async fn a_block_that_could_not_be_kept_is_sent_again(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
    decode.memory.broken.lock().unwrap().extend([3, 7]);
    let ((sent, _), outcome) = tokio::join!(deliver(decode.open(order(&decode))), decode.incoming.run());
    assert_eq!(sent.unwrap().blocks, blocks());
    assert!(matches!(outcome, Outcome::Complete(_)));
    decode.assert_filled(0);
    let writes = decode.memory.writes.lock().unwrap();
    assert!((1..=blocks()).all(|block| writes[&block] == if [3, 7].contains(&block) { 2 } else { 1 }));
}

async fn a_block_in_which_a_bit_flipped_is_sent_again(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
    decode.memory.flaky.lock().unwrap().insert(5);
    let ((sent, _), outcome) = tokio::join!(deliver(decode.open(order(&decode))), decode.incoming.run());
    assert_eq!(sent.unwrap().blocks, blocks());
    assert!(matches!(outcome, Outcome::Complete(_)));
    decode.assert_filled(0);
    assert_eq!((decode.incoming.received().refused, decode.memory.writes.lock().unwrap()[&5]), (1, 2));
}

/// Delivers what is announced under `bindings`: refused as often as it is tried, and nothing is kept.
async fn assert_refused(over: Over, bindings: Vec<Binding>, wrong: &[u32]) {
    let mut decode = Decode::start(over, 0, long()).await;
    let order = Order { bindings, ..order(&decode) };
    let error = tokio::select! {
        (result, released) = deliver(decode.open(order)) => {
            assert!(wrong.iter().all(|index| !released.contains(index)), "{released:?}");
            result.expect_err("must be refused")
        }
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
    };
    assert_eq!(error.code(), ErrorCode::Digest, "{error}");
    assert!(error.to_string().contains("of another prefix or place"), "{error}");
    let received = decode.incoming.received();
    assert!(received.blocks as usize <= blocks() as usize - wrong.len(), "{received:?}");
    assert!(received.refused >= Options::default().tries);
}

async fn blocks_of_another_prefix_are_refused(over: Over) {
    let mut other = tokens();
    other[1] = 1000;
    let all: Vec<u32> = (0..blocks()).collect();
    assert_refused(over, bindings(&other, LAYOUT.block_tokens, LAYOUT.fingerprint()), &all).await;
}

async fn blocks_that_changed_places_are_refused(over: Over) {
    let mut swapped = bindings(&tokens(), LAYOUT.block_tokens, LAYOUT.fingerprint());
    swapped.swap(2, 4);
    assert_refused(over, swapped, &[2, 4]).await;
}

async fn who_does_not_match_is_told_why(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
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
            (result, _) = deliver(decode.open(order)) => result.expect_err("must be refused"),
            outcome = decode.incoming.run() => panic!("{outcome:?}"),
        };
        assert_eq!(error.code(), code, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    assert!(decode.memory.writes.lock().unwrap().is_empty());
}

async fn the_next_epoch_keeps_what_was_accepted_and_fences_the_old(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
    let mut old = decode.open(order(&decode));
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
    let new = decode.open(Order { epoch: 2, accepted, ..order(&decode) });
    let (old, (sent, _), outcome) = tokio::join!(old.next(), deliver(new), decode.incoming.run());
    assert_eq!(old.expect_err("fenced").code(), ErrorCode::StaleEpoch);
    assert_eq!(sent.unwrap().blocks, blocks() - 3);
    assert!(matches!(outcome, Outcome::Complete(_)));
    decode.assert_filled(0);
    assert!(decode.memory.writes.lock().unwrap().values().all(|writes| *writes == 1));
}

async fn a_prefill_that_leaves_is_waited_for_only_so_long(over: Over) {
    let mut decode = Decode::start(over, 0, slowed(Duration::from_millis(300))).await;
    let mut delivery = decode.open(order(&decode));
    delivery.computed(0, 40, 1);
    tokio::select! {
        progress = delivery.next() => assert_eq!(progress.unwrap(), Progress::Release(0)),
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
    }
    drop(delivery);
    assert!(matches!(decode.incoming.run().await, Outcome::Expired));
    assert!(decode.incoming.close().is_none(), "nothing is being written");
}

async fn a_reservation_that_ends_under_a_write_says_so_until_the_write_has_landed(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
    decode.memory.slow.lock().unwrap().extend([2, 5]);
    let delivery = tokio::spawn(deliver(decode.open(order(&decode))));
    while decode.memory.waiting.lock().unwrap().len() < 2 {
        decode.receive_a_little().await;
    }
    let unsettled = decode.incoming.close().expect("two writes are in flight");
    assert_eq!(unsettled.writing(), [1, 4]);
    let error = delivery.await.unwrap().0.expect_err("the reservation has ended");
    assert_eq!(error.code(), ErrorCode::Cancelled, "{error}");
    let settling = Settling::start(unsettled);
    tokio::time::sleep(over.landing() * 3 / 2).await;
    assert!(!settling.task.is_finished(), "nothing has landed");
    decode.memory.land();
    settling.task.await.unwrap();
    assert_eq!(settling.overdue.load(Relaxed), 2, "both were overdue, and counted");
}

/// An ended reservation that waits for what is being written, and what it has said of that.
struct Settling {
    task: JoinHandle<()>,
    overdue: Arc<AtomicU32>,
    lost: Arc<AtomicU32>,
}

impl Settling {
    fn start(unsettled: Unsettled) -> Settling {
        let (overdue, lost) = (Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let count = (overdue.clone(), lost.clone());
        let task = tokio::spawn(unsettled.settle(move |received| {
            count.0.fetch_add(received.overdue, Relaxed);
            count.1.fetch_add(received.lost, Relaxed);
        }));
        Settling { task, overdue, lost }
    }
}

/// Both sides live and beat; without this nothing would end the wait.
#[tokio::test]
async fn a_reservation_is_given_up_when_its_own_device_does_not_copy() {
    let mut decode = Decode::start(Over::Grpc, 0, long()).await;
    decode.memory.slow.lock().unwrap().insert(3);
    let delivery = tokio::spawn(deliver(decode.open(order(&decode))));
    assert!(matches!(decode.incoming.run().await, Outcome::Stalled));
    assert_eq!(decode.incoming.received().overdue, 1);
    let unsettled = decode.incoming.close().expect("one write is in flight");
    assert_eq!(unsettled.writing(), [2]);
    delivery.await.unwrap().0.expect_err("the reservation has ended");
    decode.memory.land();
    unsettled.settle(drop).await;
}

/// Whose steps hold on to a block that is to be read into, severs nobody, and reads nothing once it has given up.
#[tokio::test]
async fn a_read_that_its_own_device_holds_up_is_not_the_others_fault() {
    let (memory, copies) = (Arc::new(Memory::new()), Copies::new("decode".to_owned()));
    memory.busy.lock().unwrap().insert(3);
    let pool = Pool::direct(memory.clone(), copies.clone()).unwrap();
    let mut decode = Decode::on(Over::Copies, pool, memory, 0, long()).await;
    let delivery = tokio::spawn(deliver(decode.open(order(&decode))));
    assert!(matches!(decode.incoming.run().await, Outcome::Stalled));
    let unsettled = decode.incoming.close().expect("one read waits");
    assert_eq!((unsettled.writing(), copies.severed.load(Relaxed)), (vec![2], 0));
    delivery.await.unwrap().0.expect_err("the reservation has ended");
    decode.memory.land();
    unsettled.settle(drop).await;
    assert!(!decode.memory.writes.lock().unwrap().contains_key(&3), "it was read after all");
}

/// Decode lives and says so: nothing else would end the wait.
#[tokio::test]
async fn a_delivery_ends_when_its_own_device_does_not_copy() {
    let mut decode = Decode::start(Over::Grpc, 0, long()).await;
    let source = source();
    source.slow.lock().unwrap().insert(37);
    let (beat, silence) = (Duration::from_millis(20), Duration::from_millis(300));
    let options = Options { heartbeat: beat, silence, ..Options::default() };
    let channel = transport::channel(&proto::Dial::default(), &decode.address).unwrap();
    let pulse = Box::new(proto::Heartbeat::default);
    let delivery =
        Delivery::open(channel, order(&decode), Over::Grpc.pool(source), pulse, options, MetadataMap::new());
    let error = tokio::select! {
        (result, released) = deliver(delivery) => {
            assert!(!released.contains(&3), "{released:?}");
            result.expect_err("one block is never read")
        }
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
    };
    assert!(error.to_string().contains("copied no block"), "{error}");
}

async fn a_commit_counts_for_its_own_epoch_only(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
    // The last block does not land, so that the old epoch commits and stays incomplete.
    decode.memory.slow.lock().unwrap().insert(blocks());
    let old = tokio::spawn(deliver(decode.open(order(&decode))));
    while decode.incoming.received().blocks + 1 < blocks() {
        decode.receive_a_little().await;
    }
    tokio::select! {
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
        () = tokio::time::sleep(slowed(Duration::from_millis(200))) => {}
    }
    let Answer::Advanced { epoch: 2, accepted } = decode.incoming.advance(1) else { panic!("no new epoch") };
    assert_eq!(accepted.len() as u32, blocks() - 1);
    let mut other = commit();
    other.first_token.as_mut().unwrap().id = 10;
    let new = tokio::spawn(deliver_with(decode.open(Order { epoch: 2, ..order(&decode) }), other.clone()));
    tokio::select! {
        outcome = decode.incoming.run() => panic!("{outcome:?}"),
        () = tokio::time::sleep(slowed(Duration::from_millis(200))) => {}
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

#[tokio::test]
async fn workers_of_different_transports_are_told() {
    for (decode_over, prefill_over) in [(Over::Grpc, Over::Copies), (Over::Copies, Over::Grpc)] {
        let mut decode = Decode::start(decode_over, 0, long()).await;
        let delivery = open_with(prefill_over.pool(source()), order(&decode));
        let error = tokio::select! {
            (result, _) = deliver(delivery) => result.expect_err("must be refused"),
            outcome = decode.incoming.run() => panic!("{outcome:?}"),
        };
        assert_eq!(error.code(), ErrorCode::Mismatch, "{error}");
        assert!(error.to_string().contains("start both with the same --transport"), "{error}");
    }
}

#[tokio::test]
async fn a_read_that_hangs_ends_its_reservation_and_keeps_its_block() {
    let (mut decode, copies, delivery) = hanging().await;
    assert!(matches!(decode.incoming.run().await, Outcome::Severed));
    assert_eq!((decode.incoming.received().overdue, copies.severed.load(Relaxed)), (1, 1));
    let unsettled = decode.incoming.close().expect("one read hangs");
    assert_eq!(unsettled.writing(), [0]);
    assert_eq!(delivery.await.unwrap().0.expect_err("it has ended").code(), ErrorCode::Cancelled);
    let settling = Settling::start(unsettled);
    tokio::time::sleep(Over::Copies.landing()).await;
    assert!(!settling.task.is_finished(), "severing stops nothing");
    copies.land();
    settling.task.await.unwrap();
    assert_eq!(decode.memory.get(1, rows(0)), content(0), "it has written after all");
}

#[tokio::test]
async fn a_read_of_which_nothing_will_be_known_keeps_its_block_for_ever() {
    let (mut decode, copies, delivery) = hanging().await;
    copies.lose();
    let ended = tokio::time::timeout(Over::Copies.landing() / 2, decode.incoming.run()).await;
    assert!(matches!(ended, Ok(Outcome::Severed)), "{ended:?}: it need not be waited for");
    let received = decode.incoming.received();
    assert_eq!((received.lost, received.overdue, copies.severed.load(Relaxed)), (1, 0, 0));
    delivery.await.unwrap().0.expect_err("the reservation has ended");
    let settling = Settling::start(decode.incoming.close().expect("one read is lost"));
    tokio::time::sleep(Over::Copies.landing() * 2).await;
    assert!(!settling.task.is_finished());
}

/// A reservation that has everything but its first block, the read of which hangs.
async fn hanging() -> (Decode, Arc<Copies>, JoinHandle<(Result<Sent, Error>, Vec<u32>)>) {
    let (memory, copies) = (Arc::new(Memory::new()), Copies::new("decode".to_owned()));
    copies.hang.store(1, Relaxed);
    let pool = Pool::direct(memory.clone(), copies.clone()).unwrap();
    let mut decode = Decode::on(Over::Copies, pool, memory, 0, long()).await;
    let delivery = tokio::spawn(deliver(decode.open(order(&decode))));
    while decode.memory.blocks.lock().unwrap().len() as u32 + 1 < blocks() {
        decode.receive_a_little().await;
    }
    assert_eq!(copies.hanging(), 1);
    (decode, copies, delivery)
}

/// A chunk a block: each is with decode before the next but one is computed, so that prefill's end finds nothing but its last
/// chunks under way.
async fn chunks_travel_while_later_ones_compute(over: Over) {
    let mut decode = Decode::start(over, 0, long()).await;
    let mut delivery = decode.open(order(&decode));
    let mut released = 0;
    for chunk in 0..blocks() {
        delivery.computed(chunk, 40 - chunk, u64::from(chunk));
        while released < chunk {
            tokio::select! {
                progress = delivery.next() => released += u32::from(matches!(progress, Ok(Progress::Release(_)))),
                outcome = decode.incoming.run() => panic!("{outcome:?}"),
            }
        }
    }
    assert!(released >= blocks() - 1, "only the last chunk is left when prefill ends");
    delivery.first_token(commit());
    let rest = async { while let Ok(Progress::Release(_)) = delivery.next().await {} };
    let ((), outcome) = tokio::join!(rest, decode.incoming.run());
    assert!(matches!(outcome, Outcome::Complete(_)), "{outcome:?}");
}
