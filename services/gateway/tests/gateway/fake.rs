//! A router that says what a test tells it to, over real gRPC, and remembers what it was asked; and a
//! gateway in front of it.

use crate::client::{self, PATIENCE, Reply, get};
use gateway::{Config, Server};
use proto::generate_event::Event;
use proto::router_server::{Router, RouterServer};
use proto::{
    FinishReason, Finished, GenerateEvent, GenerateRequest, Member, PromptLogprob, Role, Started,
    StatusReply, StatusRequest, Token, TokenLogprob,
};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tokenizers::Tokenizer;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// One line of a script.
#[derive(Clone)]
pub enum Act {
    Say(Event),
    Wait(u64),
    /// Until the test says so.
    Await(Arc<Notify>),
    /// Breaks off with this status.
    Fail(proto::Error),
    /// Ends the stream without an end.
    Vanish,
    /// Heartbeats for ever.
    Hang,
    /// Nothing for ever.
    Silence,
}

pub type Script = Box<dyn Fn(&GenerateRequest) -> Vec<Act> + Send + Sync>;

pub struct Fake {
    script: Script,
    pub asked: Mutex<Vec<GenerateRequest>>,
    pub traces: Mutex<Vec<String>>,
    /// Calls that the gateway left before their end.
    pub left: AtomicUsize,
    pub members: Mutex<Vec<Member>>,
    /// Times it was asked for its status.
    pub statuses: AtomicUsize,
    /// Milliseconds that its status takes.
    pub status_takes: AtomicU64,
}

pub struct Cluster {
    pub fake: Arc<Fake>,
    pub http: SocketAddr,
    pub admin: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
}

pub static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_file(checkpoint().join("tokenizer.json")).unwrap());

pub fn checkpoint() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/checkpoint")
}

pub fn encode(text: &str) -> Vec<u32> {
    TOKENIZER.encode_fast(text, false).unwrap().get_ids().to_vec()
}

impl Cluster {
    pub async fn start(script: impl Fn(&GenerateRequest) -> Vec<Act> + Send + Sync + 'static) -> Self {
        Cluster::with(script, |_| {}).await
    }

    pub async fn with(
        script: impl Fn(&GenerateRequest) -> Vec<Act> + Send + Sync + 'static,
        configure: impl FnOnce(&mut Config),
    ) -> Self {
        let (fake, router) = serve_fake(Box::new(script)).await;
        let mut config = Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            admin: SocketAddr::from(([127, 0, 0, 1], 0)),
            routers: vec![format!("http://{router}")],
            model_dir: checkpoint(),
            served_model_name: vec!["demo".into(), "org/demo".into()],
            ..Config::default()
        };
        configure(&mut config);
        let server = Server::bind(config).await.unwrap();
        let (http, admin) = (server.http().unwrap(), server.admin().unwrap());
        let (stop, stopped) = oneshot::channel();
        tokio::spawn(server.serve(async { drop(stopped.await) }));
        Cluster { fake, http, admin, stop: Some(stop) }
    }

    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub async fn chat(&self, extra: Value) -> Reply {
        client::post(self.http, "/v1/chat/completions", &chat(extra)).await
    }

    pub async fn complete(&self, extra: Value) -> Reply {
        client::post(self.http, "/v1/completions", &completion(extra)).await
    }

    pub fn asked(&self) -> Vec<GenerateRequest> {
        self.fake.asked.lock().unwrap().clone()
    }

    /// Until the router has been asked this often.
    pub async fn until_asked(&self, times: usize) {
        until("asked", async || self.fake.asked.lock().unwrap().len() >= times).await;
    }

    /// Until the gateway has left this many calls.
    pub async fn left(&self, calls: usize) {
        let left = async || self.fake.left.load(Ordering::SeqCst) >= calls;
        until("left: the call goes on though nobody reads it", left).await;
    }

    /// Until the admin port's metrics have this line.
    pub async fn until_metric(&self, line: &str) {
        until(line, async || get(self.admin, "/metrics").await.body.contains(line)).await;
    }

    /// Asserts what `/ready` says. It is how things are just now, unless finding out took too long: then it is asked again.
    pub async fn ready(&self, status: u16, part: &str) -> Reply {
        for _ in 0..10 {
            let asked = Instant::now();
            let ready = get(self.http, "/ready").await;
            if ready.status == status && ready.body.contains(part) {
                return ready;
            }
            assert!(
                asked.elapsed() >= JUST_NOW,
                "not {status} {part:?}, but {} {}",
                ready.status,
                ready.body
            );
        }
        panic!("/ready was never fresh");
    }
}

/// How long `/ready` waits for news.
const JUST_NOW: Duration = Duration::from_secs(1);

async fn until(what: &str, done: impl AsyncFn() -> bool) {
    let waiting = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, waiting).await.is_ok(), "never {what}");
}

pub fn chat(extra: Value) -> Value {
    merged(
        serde_json::json!({"model": "demo", "messages": [{"role": "user", "content": "What is `Vec`?"}]}),
        extra,
    )
}

pub fn completion(extra: Value) -> Value {
    merged(serde_json::json!({"model": "demo", "prompt": "fn main", "max_tokens": 64}), extra)
}

fn merged(mut request: Value, extra: Value) -> Value {
    request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    request
}

pub async fn serve_fake(script: Script) -> (Arc<Fake>, SocketAddr) {
    let members = [Role::Prefill, Role::Decode].map(|role| Member { role: role as i32, ..Member::default() });
    let fake = Arc::new(Fake {
        script,
        asked: Mutex::default(),
        traces: Mutex::default(),
        left: AtomicUsize::new(0),
        members: Mutex::new(members.to_vec()),
        statuses: AtomicUsize::new(0),
        status_takes: AtomicU64::new(0),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = RouterServer::new(Shared(fake.clone()));
    tokio::spawn(
        tonic::transport::Server::builder()
            .max_concurrent_streams(Some(1024))
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true))),
    );
    (fake, address)
}

struct Shared(Arc<Fake>);

#[tonic::async_trait]
impl Router for Shared {
    type GenerateStream = ReceiverStream<Result<GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let trace = request.metadata().get("traceparent").map(|value| value.to_str().unwrap().to_owned());
        self.0.traces.lock().unwrap().push(trace.unwrap_or_default());
        let request = request.into_inner();
        self.0.asked.lock().unwrap().push(request.clone());
        let script = (self.0.script)(&request);
        if let Some(Act::Fail(error)) = script.first() {
            return Err(error.clone().into());
        }
        let (out, events) = mpsc::channel(1);
        tokio::spawn(play(self.0.clone(), script, out));
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.0.statuses.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(self.0.status_takes.load(Ordering::SeqCst))).await;
        Ok(Response::new(StatusReply {
            members: self.0.members.lock().unwrap().clone(),
            ..StatusReply::default()
        }))
    }
}

async fn play(fake: Arc<Fake>, script: Vec<Act>, out: mpsc::Sender<Result<GenerateEvent, Status>>) {
    let say = |event| out.send(Ok(GenerateEvent { event: Some(event), latency: None }));
    for act in script {
        let heard = match act {
            Act::Say(event) => say(event).await.is_ok(),
            Act::Wait(ms) => {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                !out.is_closed()
            }
            Act::Await(word) => {
                word.notified().await;
                !out.is_closed()
            }
            Act::Fail(error) => out.send(Err(error.into())).await.is_ok(),
            Act::Vanish => return,
            Act::Silence => {
                out.closed().await;
                false
            }
            Act::Hang => {
                while say(Event::Heartbeat(proto::Heartbeat::default())).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                false
            }
        };
        if !heard {
            fake.left.fetch_add(1, Ordering::SeqCst);
            return;
        }
    }
}

pub fn started() -> Act {
    let (prefill_member, decode_member) = ("p-1".into(), "d-1".into());
    Act::Say(Event::Started(Started { cached_tokens: 3, prefill_member, decode_member, attempt: 1 }))
}

/// Tokens after those that there are, each with logprobs: its own is minus its index, a rival's is one below.
pub fn tokens(request: &GenerateRequest, ids: &[u32]) -> Vec<Act> {
    let first = request.sequence.as_ref().unwrap().tokens.len() as u32;
    let one = |(index, id): (usize, &u32)| {
        let own = TokenLogprob { token: *id, logprob: -(index as f32), rank: 1 };
        let rival = TokenLogprob { token: id + 1, logprob: f32::NEG_INFINITY, rank: 2 };
        let position = first + index as u32;
        Act::Say(Event::Token(Token { id: *id, position, logprob: Some(own), top: vec![own, rival] }))
    };
    ids.iter().enumerate().map(one).collect()
}

pub fn prompt_logprobs(request: &GenerateRequest) -> Vec<Act> {
    let tokens = &request.sequence.as_ref().unwrap().tokens;
    let one = |position: usize| {
        let logprob = TokenLogprob { token: tokens[position], logprob: -(position as f32), rank: 1 };
        Act::Say(Event::PromptLogprob(PromptLogprob {
            position: position as u32,
            logprob: Some(logprob),
            top: vec![logprob],
        }))
    };
    (1..tokens.len()).map(one).collect()
}

pub fn finished(reason: FinishReason, stop_token: Option<u32>) -> Act {
    Act::Say(Event::Finished(Finished { reason: reason as i32, stop_token }))
}

/// A whole answer that ends with the model's own end token.
pub fn answer(request: &GenerateRequest, text: &str) -> Vec<Act> {
    let ids = [encode(text), vec![1]].concat();
    [vec![started()], tokens(request, &ids), vec![finished(FinishReason::Stop, Some(1))]].concat()
}

/// The beginning of an answer, then nothing but heartbeats.
pub fn endless(request: &GenerateRequest, text: &str) -> Vec<Act> {
    [vec![started()], tokens(request, &encode(text)), vec![Act::Hang]].concat()
}
