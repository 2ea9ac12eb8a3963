//! Workers for tests: they speak the real services over loopback and follow a script. The token of position
//! p is always `1000 + p`, so that any loss, repetition or gap shows in the answer.

use crate::{
    Config, Shared,
    admission::Admission,
    channels::{self, Channels},
    cluster::{self, Cluster},
    config::ms,
    metrics::Metrics,
    policy::Credits,
    probe,
    service::{Events, Service},
};
use futures::StreamExt;
use membership::View;
use proto::{
    DecodeCall, DecodeEvent, Dial, Error, ErrorCode, FinishReason, GenerateRequest, Heartbeat, Load, Member,
    PrefillEvent, PrefillRequest, Role, Sampling, Sequence, Stop, Token, TokenLogprob, decode_call::Call,
    decode_event::Event as D, decode_server, generate_event::Event, prefill_event::Event as P,
    prefill_server, router_server::Router as _,
};
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::{Instant, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::server::TcpIncoming};

/// How a decode worker treats one call; calls beyond the script go well.
#[derive(Clone, Copy, Debug, Default)]
pub enum DecodeScript {
    #[default]
    Well,
    Refuse(ErrorCode),
    /// After this many tokens of its own:
    Die(u32),
    Preempt(u32),
    Silent(u32),
    Stuck(u32),
    Repeat(u32),
    Fail(u32, ErrorCode),
    /// Tokens of some 25 KB, as fast as they are taken.
    Wide,
    /// Never answers an advance, and beats on.
    Deaf,
    /// Cannot read what prefill offers.
    Unread,
}

/// How a prefill worker treats one call.
#[derive(Clone, Copy, Debug, Default)]
pub enum PrefillScript {
    #[default]
    Well,
    Fail(ErrorCode),
    DieBeforeFirst,
    /// The first token is out, the blocks are not.
    DieAfterFirst,
    /// The blocks are out, the first token is not.
    DieUnheard,
    /// Both are out, the last word is not.
    DieDelivered,
    Silent,
    /// Computes for ever.
    Busy,
    /// The blocks are out long before the first token is heard.
    Late,
    /// Names one first token to the router and another to decode.
    Contradict,
}

/// What all fakes of one test share.
#[derive(Default)]
pub struct World {
    reservations: Mutex<HashMap<u64, mpsc::Sender<(u32, Token)>>>,
    next: AtomicU64,
    pub decode: Mutex<VecDeque<DecodeScript>>,
    pub prefill: Mutex<VecDeque<PrefillScript>>,
    /// What was asked of decode and prefill workers, with the worker's id.
    pub decodes: Mutex<Vec<(String, Sequence, bool)>>,
    pub prefills: Mutex<Vec<(String, PrefillRequest)>>,
    /// Calls that run now.
    pub active: Arc<()>,
}

#[derive(Clone)]
struct Fake {
    id: String,
    world: Arc<World>,
}

impl World {
    /// Starts a worker and returns its record.
    pub async fn worker(self: &Arc<Self>, id: &str, role: Role) -> Member {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let fake = Fake { id: id.into(), world: self.clone() };
        let server = tonic::transport::Server::builder()
            .add_service(decode_server::DecodeServer::new(fake.clone()))
            .add_service(prefill_server::PrefillServer::new(fake));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        let load = Load { blocks_total: 100, blocks_free: 100, ..Load::default() };
        Member {
            id: id.into(),
            role: role as i32,
            address,
            model: "demo".into(),
            block_tokens: 4,
            max_context: 400,
            max_sequences: 4,
            load: Some(load),
            ..Member::default()
        }
    }

    pub fn active(&self) -> usize {
        Arc::strong_count(&self.active) - 1
    }

    pub async fn idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.active() > 0 {
            assert!(Instant::now() < deadline, "{} calls still run", self.active());
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn wide(position: u32) -> Token {
    let one = TokenLogprob { token: 1 << 20, logprob: 1.0, rank: 1 };
    Token { top: vec![one; 2000], ..token(position) }
}

fn token(position: u32) -> Token {
    Token { id: 1000 + position, position, ..Token::default() }
}

/// The sending half of a fake's event stream.
struct Out<E> {
    events: mpsc::Sender<Result<E, Status>>,
    /// Counts as one of [`World::active`].
    _active: Arc<()>,
}

impl Out<DecodeEvent> {
    /// Whether anybody listens.
    async fn say(&self, event: D) -> bool {
        self.events.send(Ok(DecodeEvent { event: Some(event), latency: None })).await.is_ok()
    }

    async fn silent(&self) {
        self.events.closed().await;
    }

    async fn stuck(&self) {
        while self.say(D::Heartbeat(Heartbeat { step: 7, working: true, ..Heartbeat::default() })).await {
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Tokens after `from`, as the script says. `length`: of the whole sequence.
    async fn tokens(&self, from: u32, length: u32, script: DecodeScript) {
        for position in from..length {
            match script {
                DecodeScript::Die(after) if position - from == after => return,
                DecodeScript::Silent(after) if position - from == after => return self.silent().await,
                DecodeScript::Stuck(after) if position - from == after => return self.stuck().await,
                DecodeScript::Preempt(after) if position - from == after => {
                    self.say(D::Preempted(proto::Preempted {})).await;
                    return;
                }
                DecodeScript::Fail(after, code) if position - from == after => {
                    self.say(D::Error(Error::new(code, "as scripted"))).await;
                    return;
                }
                DecodeScript::Repeat(after) if position - from == after => {
                    self.say(D::Token(token(position - 1))).await;
                }
                DecodeScript::Wide => match self.say(D::Token(wide(position))).await {
                    true => continue,
                    false => return,
                },
                _ => {}
            }
            sleep(Duration::from_millis(2)).await;
            if !self.say(D::Token(token(position))).await {
                return;
            }
        }
        let reason = FinishReason::Length as i32;
        self.say(D::Finished(proto::DecodeFinished { reason, stop_token: None })).await;
    }
}

#[tonic::async_trait]
impl decode_server::Decode for Fake {
    type GenerateStream = ReceiverStream<Result<DecodeEvent, Status>>;

    async fn generate(
        &self,
        request: Request<Streaming<DecodeCall>>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let (sender, events) = mpsc::channel(64);
        let out = Out { events: sender, _active: self.world.active.clone() };
        let fake = self.clone();
        tokio::spawn(async move {
            let gone = out.events.clone();
            tokio::select! {
                () = fake.decode(request.into_inner(), out) => {}
                () = gone.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(events)))
    }
}

impl Fake {
    async fn decode(self, mut calls: Streaming<DecodeCall>, out: Out<DecodeEvent>) {
        let Ok(Some(DecodeCall { call: Some(Call::Start(start)) })) = calls.message().await else { return };
        let sequence = start.sequence.unwrap();
        let asked = (self.id.clone(), sequence.clone(), start.prefill_here);
        self.world.decodes.lock().unwrap().push(asked);
        let script = self.world.decode.lock().unwrap().pop_front().unwrap_or_default();
        if let DecodeScript::Refuse(code) = script {
            out.say(D::Error(Error::new(code, "as scripted"))).await;
            return;
        }
        let length = sequence.prompt_len + sequence.stop.as_ref().unwrap().max_tokens;
        let len = sequence.tokens.len() as u32;
        if start.prefill_here {
            out.say(D::LocalPrefill(proto::LocalPrefill { cached_tokens: 3 })).await;
            return out.tokens(len, length, script).await;
        }
        let Some(first) = self.receive(&mut calls, &out, len, script).await else { return };
        out.say(D::Decoding(proto::Decoding { first_token: Some(first) })).await;
        out.tokens(len + 1, length, script).await;
        // Answers until the router lets go, as a late advance may still come.
        while let Ok(Some(_)) = calls.message().await {
            out.say(D::AlreadyComplete(proto::AlreadyComplete {})).await;
        }
    }

    async fn receive(
        &self,
        calls: &mut Streaming<DecodeCall>,
        out: &Out<DecodeEvent>,
        len: u32,
        script: DecodeScript,
    ) -> Option<Token> {
        let reservation = self.world.next.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, mut commits) = mpsc::channel(4);
        self.world.reservations.lock().unwrap().insert(reservation, sender);
        let mut epoch = 1;
        let blocks_needed = len.div_ceil(4);
        out.say(D::Reserved(proto::Reserved { reservation, epoch, blocks_present: 1, blocks_needed })).await;
        let (mut pulse, mut beats) = (interval(Duration::from_millis(50)), 0);
        loop {
            tokio::select! {
                call = calls.message() => match call {
                    Ok(Some(DecodeCall { call: Some(Call::Advance(advance)) })) => {
                        assert_eq!((advance.reservation, advance.epoch), (reservation, epoch));
                        if matches!(script, DecodeScript::Deaf) {
                            continue;
                        }
                        epoch += 1;
                        out.say(D::Advanced(proto::Advanced { epoch, accepted: vec![1] })).await;
                    }
                    _ => return None,
                },
                Some((of, first)) = commits.recv() => if of == epoch { return Some(first) },
                _ = pulse.tick() => {
                    out.say(D::Heartbeat(Heartbeat::default())).await;
                    beats += 1;
                    if beats > 4 && matches!(script, DecodeScript::Unread) {
                        out.say(D::Error(Error::new(ErrorCode::PeerLost, "as scripted"))).await;
                        return None;
                    }
                }
            }
        }
    }

    async fn prefill(self, request: PrefillRequest, out: Out<PrefillEvent>) {
        let say = async |event| {
            out.events.send(Ok(PrefillEvent { event: Some(event), latency: None })).await.is_ok()
        };
        let sequence = request.sequence.clone().unwrap();
        self.world.prefills.lock().unwrap().push((self.id.clone(), request.clone()));
        let script = self.world.prefill.lock().unwrap().pop_front().unwrap_or_default();
        say(P::Started(proto::PrefillStarted { cached_tokens: 4 })).await;
        match script {
            PrefillScript::Fail(code) => {
                say(P::Error(Error::new(code, "as scripted"))).await;
                return;
            }
            PrefillScript::DieBeforeFirst => return,
            PrefillScript::Silent => return out.events.closed().await,
            PrefillScript::Busy => loop {
                let beat = P::Heartbeat(Heartbeat {
                    step: self.world.next.fetch_add(1, Ordering::Relaxed),
                    working: true,
                    ..Heartbeat::default()
                });
                if !say(beat).await {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            },
            _ => {}
        }
        let first = request.forced.unwrap_or_else(|| token(sequence.tokens.len() as u32));
        let commits = self.world.reservations.lock().unwrap()[&request.reservation].clone();
        let commit = (request.epoch, first.clone());
        match script {
            PrefillScript::DieUnheard => {
                let _ = commits.send(commit).await;
                return sleep(Duration::from_millis(30)).await;
            }
            PrefillScript::Late => {
                let _ = commits.send(commit.clone()).await;
                sleep(Duration::from_millis(50)).await;
            }
            _ => {}
        }
        let scored =
            if sequence.sampling.unwrap().prompt_logprobs.is_some() { sequence.prompt_len } else { 1 };
        for position in 1..scored {
            say(P::PromptLogprob(proto::PromptLogprob { position, ..Default::default() })).await;
        }
        let id = first.id + u32::from(matches!(script, PrefillScript::Contradict));
        say(P::FirstToken(Token { id, ..first })).await;
        if matches!(script, PrefillScript::DieAfterFirst) {
            return;
        }
        let _ = commits.send(commit).await;
        if matches!(script, PrefillScript::DieDelivered) {
            return sleep(Duration::from_millis(30)).await;
        }
        say(P::Delivered(proto::Delivered { bytes: 1, blocks: 1, finished: None, stop_token: None })).await;
    }
}

#[tonic::async_trait]
impl prefill_server::Prefill for Fake {
    type PrefillStream = ReceiverStream<Result<PrefillEvent, Status>>;

    async fn prefill(
        &self,
        request: Request<PrefillRequest>,
    ) -> Result<Response<Self::PrefillStream>, Status> {
        let (sender, events) = mpsc::channel(64);
        let out = Out { events: sender, _active: self.world.active.clone() };
        let fake = self.clone();
        tokio::spawn(async move {
            let gone = out.events.clone();
            tokio::select! {
                () = fake.prefill(request.into_inner(), out) => {}
                () = gone.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(events)))
    }
}

/// A router over fake workers, its membership set by hand.
pub struct Bench {
    pub world: Arc<World>,
    pub shared: Arc<Shared>,
    pub members: Vec<Member>,
    service: Service,
}

pub fn config() -> Config {
    let mut config = Config::default();
    config.queue.timeout_ms = 10_000;
    config.liveness.silence_ms = 1500;
    config.liveness.heartbeat_ms = 50;
    config.members.probe_ms = 20;
    config.members.retry_ms = 20;
    config.members.refusal_ms = 50;
    config
}

impl Bench {
    pub async fn start(config: Config, workers: &[(&str, Role)]) -> Self {
        let world = Arc::new(World::default());
        let mut members = Vec::new();
        for (id, role) in workers {
            members.push(world.worker(id, *role).await);
        }
        let shared = Arc::new(shared(config));
        let bench = Bench { world, service: Service { shared: shared.clone() }, shared, members };
        bench.view(&bench.members);
        let admission = bench.shared.admission.clone();
        tokio::spawn(async move { admission.run().await });
        let shared = bench.shared.clone();
        tokio::spawn(async move { probe::run(&shared).await });
        bench
    }

    pub fn view(&self, members: &[Member]) {
        self.shared.cluster.update(&View {
            members: members.to_vec(),
            revision: 1,
            connected: true,
            ..View::default()
        });
    }

    pub fn script(&self, decode: &[DecodeScript], prefill: &[PrefillScript]) {
        self.world.decode.lock().unwrap().extend(decode);
        self.world.prefill.lock().unwrap().extend(prefill);
    }

    pub async fn ask(&self, request: GenerateRequest) -> Result<Events, Status> {
        Ok(self.service.generate(Request::new(request)).await?.into_inner())
    }

    /// The answer to a prompt of so many tokens, to its end.
    pub async fn answer(&self, prompt: u32, max_tokens: u32) -> Answer {
        collect(self.ask(request(prompt, max_tokens)).await.unwrap()).await
    }

    /// Everything is given back: calls ended, credits and slots returned, nothing in the queue or running.
    pub async fn quiet(&self) {
        self.world.idle().await;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.shared.admission.busy() || self.shared.cluster.owes() {
            assert!(Instant::now() < deadline, "the router still holds something");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn shared(config: Config) -> Shared {
    let cluster = Cluster::new(cluster::Settings {
        credits: Credits { tokens: config.prefill.tokens, requests: config.prefill.requests },
        refusal: ms(config.members.refusal_ms),
        prefix_blocks: config.members.prefix_blocks,
    });
    let silence = ms(config.liveness.silence_ms);
    let settings = channels::Settings { per_address: 2, connect: silence, silence };
    let channels = Channels::new(settings, Dial::default());
    let admission = Admission::new(cluster.clone(), &config);
    let metrics = Metrics::new(&mut telemetry::Registry::default());
    let spans = telemetry::Spans::off();
    Shared {
        config,
        cluster,
        admission,
        channels,
        metrics,
        spans,
        draining: AtomicBool::new(false),
        lives: watch::Sender::new(()),
    }
}

pub fn request(prompt: u32, max_tokens: u32) -> GenerateRequest {
    let sequence = Sequence {
        request_id: "r".into(),
        tokens: (0..prompt).collect(),
        prompt_len: prompt,
        sampling: Some(Sampling::default()),
        stop: Some(Stop { max_tokens, ..Stop::default() }),
        priority: 0,
    };
    GenerateRequest { sequence: Some(sequence), ..GenerateRequest::default() }
}

#[derive(Debug, Default)]
pub struct Answer {
    pub started: Vec<proto::Started>,
    pub tokens: Vec<Token>,
    /// Positions.
    pub prompt_logprobs: Vec<u32>,
    pub error: Option<Error>,
    pub finished: bool,
}

impl Answer {
    /// Asserts that it is the whole answer to `prompt` tokens, each token exactly once.
    pub fn is_whole(&self, prompt: u32, max_tokens: u32) {
        let expected: Vec<_> = (prompt..prompt + max_tokens).map(token).collect();
        assert_eq!(self.error, None);
        assert_eq!(self.tokens, expected);
        assert!(self.finished);
        assert_eq!(self.started.len(), 1, "said once, before any token");
    }

    pub fn code(&self) -> ErrorCode {
        self.error.as_ref().expect("no error").code()
    }
}

pub async fn collect(mut events: Events) -> Answer {
    let (mut answer, started) = (Answer::default(), Instant::now());
    let most = Duration::from_secs(20);
    while let Some(event) = timeout(most, events.next()).await.expect("the answer ends") {
        if started.elapsed() > most {
            panic!("no end after {most:?}: {answer:?}");
        }
        match event.unwrap().event.unwrap() {
            Event::Started(started) => answer.started.push(started),
            Event::Token(token) => {
                assert!(!answer.started.is_empty(), "a token before Started");
                answer.tokens.push(token);
            }
            Event::Finished(_) => answer.finished = true,
            Event::Error(error) => answer.error = Some(error),
            Event::Heartbeat(_) => {}
            Event::PromptLogprob(logprob) => {
                assert!(answer.tokens.is_empty(), "a prompt logprob after a token");
                answer.prompt_logprobs.push(logprob.position);
            }
        }
    }
    answer
}
