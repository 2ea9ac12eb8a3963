//! A prefill worker whose process stands still or dies while its memory is being read, over NIXL and TCP, where a read needs
//! the process: nobody may have the block before the read has ended. Each test runs in a process of its own, for UCX takes its
//! transports from the environment, and starts that worker as another.

use super::*;
use handoff::{
    direct::{Direct, Piece},
    nixl,
};
use kv::{KvError, KvMemory};
use prost::Message as _;
use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Instant,
};

/// What this process is in a test: nothing, `decode`, or the address of the decode worker to deliver to.
const PART: &str = "BATON_TEST_PART";
/// The block of the sequence that is being read when the process stops, and where decode has it. It is not full, so that it
/// is read in several pieces.
const STOPPED: (u32, u32) = (7, 8);
/// A block of decode's pool that no reservation has.
const SPARE: u32 = 60;

#[tokio::test]
async fn a_block_is_given_back_when_the_read_of_a_stopped_process_has_ended() {
    play("a_block_is_given_back_when_the_read_of_a_stopped_process_has_ended", resumes).await;
}

#[tokio::test]
async fn a_block_is_kept_when_the_process_that_it_is_read_from_dies() {
    play("a_block_is_kept_when_the_process_that_it_is_read_from_dies", dies).await;
}

async fn play(name: &str, decode: impl AsyncFnOnce(&str)) {
    match std::env::var(PART) {
        Err(_) if Over::Nixl.is_there() => {
            let mut alone = part(name, "decode");
            assert!(alone.env("UCX_TLS", "tcp").status().unwrap().success(), "see its output above");
        }
        Err(_) => {}
        Ok(part) if part == "decode" => decode(name).await,
        Ok(address) => prefill(&address).await,
    }
}

/// The same test in another process.
fn part(name: &str, part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("stopped::{name}"), "--exact", "--nocapture"]).env(PART, part);
    command
}

/// Delivers, and then lives until it is killed.
async fn prefill(address: &str) {
    let memory = source();
    let direct = nixl::open(&format!("prefill-{}", std::process::id()), &*memory).unwrap();
    let place = memory.region().unwrap().block(&LAYOUT, 40);
    let origin: String = direct.origin().encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect();
    println!("\nORIGIN {origin} {place}");
    let delivery = open_with(Pool::direct(memory, direct.clone()).unwrap(), order_to(address));
    let ended = deliver(delivery).await;
    eprintln!("the delivery ended: {ended:?}");
    std::future::pending::<()>().await;
    drop(direct);
}

/// A decode worker, and a prefill worker that stands still under the read of one block.
struct Stage {
    direct: Arc<dyn Direct>,
    memory: Arc<Memory>,
    settling: Settling,
    peer: Peer,
}

impl Stage {
    async fn set(name: &str) -> Stage {
        let memory = Arc::new(Memory::new());
        // Holds the read up until the other process has stopped.
        memory.busy.lock().unwrap().insert(STOPPED.1);
        let direct = nixl::open(&format!("decode-{}", std::process::id()), &*memory).unwrap();
        let pool = Pool::direct(memory.clone(), direct.clone()).unwrap();
        let mut decode = Decode::on(Over::Nixl, pool, memory.clone(), 0, long()).await;
        let peer = Peer::start(name, &decode.address);
        while memory.blocks.lock().unwrap().len() as u32 + 1 < blocks() {
            decode.receive_a_little().await;
        }
        peer.stop();
        memory.land();
        let outcome = decode.incoming.run().await;
        assert!(matches!(outcome, Outcome::Severed), "{outcome:?}");
        let unsettled = decode.incoming.close().expect("a block is being read");
        assert_eq!(unsettled.writing(), [STOPPED.0]);
        Stage { direct, memory, settling: Settling::start(unsettled), peer }
    }

    /// The first block of the sequence.
    async fn read_spare(&self) -> Result<(), KvError> {
        let to = self.memory.region().unwrap().block(&LAYOUT, SPARE);
        let piece = Piece { from: self.peer.place, to, bytes: LAYOUT.block_bytes() };
        let read = self.direct.read(&self.peer.origin, vec![piece]);
        tokio::time::timeout(long(), read).await.expect("it ends").unwrap()
    }

    fn found(&self) -> Vec<Bytes> {
        (1..=blocks()).map(|block| self.memory.get(block, LAYOUT.block_tokens)).collect()
    }
}

async fn resumes(name: &str) {
    let mut stage = Stage::set(name).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(!stage.settling.task.is_finished(), "given back under a read");
    let refused = stage.read_spare().await.unwrap_err();
    assert!(refused.to_string().contains("before they have no other begins"), "{refused}");

    stage.peer.signal("CONT");
    tokio::time::timeout(long(), &mut stage.settling.task).await.expect("the read ends").unwrap();
    assert_eq!(stage.settling.lost.load(Relaxed), 0);
    assert_eq!(stage.memory.get(STOPPED.1, rows(STOPPED.0)), content(STOPPED.0), "it came late, and whole");

    stage.memory.put(STOPPED.1, LAYOUT.block_tokens, &vec![0xa5; LAYOUT.block_bytes()]);
    let others = stage.found();
    stage.read_spare().await.expect("and it is read from again");
    assert_eq!(stage.memory.get(SPARE, rows(0)), content(0));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(stage.found() == others, "something wrote into a block that was given back");
}

async fn dies(name: &str) {
    let mut stage = Stage::set(name).await;
    stage.peer.child.kill().unwrap();
    let began = Instant::now();
    while stage.settling.lost.load(Relaxed) == 0 {
        assert!(began.elapsed() < long() && !stage.settling.task.is_finished(), "an error is no end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!stage.settling.task.is_finished(), "given back, and nobody can know");
}

struct Peer {
    child: Child,
    origin: proto::Origin,
    /// Where the first block of the sequence lies.
    place: usize,
}

impl Peer {
    fn start(name: &str, address: &str) -> Peer {
        let mut child = part(name, address).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = lines.map(Result::unwrap).find_map(|line| Some(line.strip_prefix("ORIGIN ")?.to_owned()));
        let (origin, place) = said.as_deref().and_then(|said| said.split_once(' ')).expect("it opens NIXL");
        let bytes: Vec<u8> = (0..origin.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&origin[at..at + 2], 16).unwrap())
            .collect();
        Peer { child, origin: proto::Origin::decode(&*bytes).unwrap(), place: place.parse().unwrap() }
    }

    fn signal(&self, signal: &str) {
        let kill = format!("kill -{signal} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Returns when all its threads stand still.
    fn stop(&self) {
        self.signal("STOP");
        let tasks = format!("/proc/{}/task", self.child.id());
        let stopped = |task: std::fs::DirEntry| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T')
        };
        while !std::fs::read_dir(&tasks).unwrap().all(|task| stopped(task.unwrap())) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
