//! `baton doctor` over real processes: faults planted one by one, each found as what it is, with its remedy and exit code,
//! and nothing beside it; a healthy cluster is called healthy.

use crate::harness::{Cluster, alone, baton, block_on, etcd_cluster::EtcdCluster, root};
use axum::{Router, extract::State, http::Uri, response::IntoResponse};
use etcd_client::{AlarmAction, AlarmOptions, AlarmType};
use membership::{Membership, MembershipConfig, Registration};
use proto::{Member, Role};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::Value;
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout};

/// On a busy machine only what is planted shall show.
const PATIENT: [&str; 8] =
    ["--strict", "--timeout", "10", "--least-rate", "0.0001", "--most-round-trip", "5000", "--json"];

#[derive(Debug)]
struct Told {
    code: i32,
    /// Check, severity, what was found, remedy.
    problems: Vec<[String; 4]>,
    all: Value,
}

fn doctor(arguments: &[&str]) -> Told {
    told(Command::new(baton()).arg("doctor").args(arguments).args(PATIENT))
}

fn told(command: &mut Command) -> Told {
    let output = command.output().unwrap();
    let all: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)));
    let findings = all["findings"].as_array().unwrap().iter();
    let bad = findings.filter(|finding| finding["severity"] == "warning" || finding["severity"] == "error");
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    let problems = bad.map(|finding| {
        let subject = format!("{}: {}", text(finding, "subject"), text(finding, "found"));
        [text(finding, "check"), text(finding, "severity"), subject, text(finding, "remedy")]
    });
    Told { code: output.status.code().unwrap(), problems: problems.collect(), all }
}

impl Told {
    /// Exactly one thing is wrong: of this check and severity, and its text and its remedy have these words.
    #[track_caller]
    fn only(&self, check: &str, severity: &str, found: &str, remedy: &str) {
        let [[c, s, f, r]] = self.problems.as_slice() else {
            panic!("expected {check} {found}: {:#?}", self.problems)
        };
        assert_eq!((c.as_str(), s.as_str()), (check, severity), "{f}");
        assert!(f.contains(found), "{found:?} is not in {f:?}");
        assert!(r.contains(remedy), "{remedy:?} is not in {r:?}");
        assert_eq!(self.code, if severity == "error" { 2 } else { 1 });
    }

    #[track_caller]
    fn nothing(&self) {
        assert_eq!((self.code, &self.problems), (0, &Vec::new()), "{:#}", self.all);
    }
}

/// Room for the defaults' connections, whatever this machine gives its shells.
fn enough_files() {
    let limit = getrlimit(Resource::Nofile);
    let enough = limit.maximum.map_or(8192, |most| most.min(8192));
    setrlimit(Resource::Nofile, Rlimit { current: Some(enough), ..limit }).unwrap();
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        enough_files();
        Files(tempfile::TempDir::new().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The demo model, to be damaged.
    fn model(&self, name: &str) -> PathBuf {
        let copy = self.0.path().join(name);
        fs::create_dir(&copy).unwrap();
        for file in fs::read_dir(root().join("deploy/demo/checkpoint")).unwrap().flatten() {
            fs::copy(file.path(), copy.join(file.file_name())).unwrap();
        }
        copy
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn doctor_finds_what_is_wrong_with_files_and_this_machine() {
    let files = Files::new();
    let config = |text: &str| doctor(&["--config", &format!("worker={}", files.write("w.toml", text))]);
    const WORKER: &str = "membership.registry = \"http://127.0.0.1:7700\"\n";
    config(WORKER).nothing();
    config(&format!("{WORKER}block_tokenz = 16\n")).only(
        "config",
        "error",
        "unknown field `block_tokenz`",
        "correct the file",
    );
    config(&format!("{WORKER}max_reserved_share = 7.0\n")).only(
        "config",
        "error",
        "max_reserved_share",
        "correct the value",
    );
    if !crate::harness::has_nixl() {
        let nixl = config(&format!("{WORKER}handoff.transport = \"nixl\"\n"));
        // What it would need of this machine is told too; whether that is right depends on the machine.
        let rdma: Vec<_> = nixl.problems.iter().filter(|[_, severity, ..]| severity == "error").collect();
        assert!(nixl.code == 2 && rdma.len() == 1 && rdma[0][0] == "rdma", "{nixl:#?}");
        assert!(
            rdma[0][2].contains("built without it") && rdma[0][3].contains("--features rdma"),
            "{nixl:#?}"
        );
    }

    let held = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = held.local_addr().unwrap();
    config(&format!("{WORKER}listen = \"{port}\"\n")).only(
        "ports",
        "error",
        "in use by cluster",
        "another port",
    );
    config(&format!("{WORKER}listen = \"127.0.0.1:4711\"\nadmin = \"127.0.0.1:4711\"\n")).only(
        "ports",
        "error",
        "is also listen",
        "give admin another port",
    );

    let sound = files.model("sound");
    doctor(&["--model", path(&sound)]).nothing();
    let cut = files.model("cut");
    let shard = fs::File::options().write(true).open(cut.join("model.safetensors")).unwrap();
    shard.set_len(1_000_000).unwrap();
    doctor(&["--model", path(&cut)]).only("model", "error", "truncated: expected", "fetch the file");
    let dumb = files.model("dumb");
    fs::remove_file(dumb.join("tokenizer.json")).unwrap();
    doctor(&["--model", path(&dumb)]).only("model", "error", "tokenizer.json", "download tokenizer.json");
    let sharded = files.model("sharded");
    fs::remove_file(sharded.join("model.safetensors")).unwrap();
    let index = r#"{"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}"#;
    fs::write(sharded.join("model.safetensors.index.json"), index).unwrap();
    doctor(&["--model", path(&sharded)]).only(
        "model",
        "error",
        "model-00001-of-00001.safetensors",
        "fetch the file",
    );

    let few = format!(
        "ulimit -n 256; exec {} doctor --model {} {}",
        path(baton()),
        path(&sound),
        PATIENT.join(" ")
    );
    told(Command::new("sh").args(["-c", &few])).only("limits", "warning", "at most 256", "ulimit -n 2048");
}

#[test]
fn doctor_finds_what_is_wrong_with_a_cluster() {
    let _alone = alone();
    enough_files();
    let mut etcd = EtcdCluster::start(3);
    let endpoints = etcd.endpoints().join(",");
    let cluster = Cluster::up(&[
        "--backend",
        "sim",
        "--etcd",
        &endpoints,
        "--worker-set",
        "membership.lease_ms=60000",
        "--router-set",
        "lease_ms=60000",
    ]);
    block_on(async {
        let both = ["--cluster", &cluster.url, "--etcd", &endpoints];
        let ask = || doctor(&both);
        ask().nothing();
        let text = Command::new(baton())
            .args(["doctor", "--cluster", &cluster.url, "--timeout", "10"])
            .output()
            .unwrap();
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(text.contains("0 errors") && text.contains("GB/s") && !text.contains('\x1b'), "{text}");

        let records = Records::of(&etcd, &cluster).await;
        foreign_members(&records, &ask).await;
        a_clock_that_goes_wrong(&cluster).await;

        let decode = cluster.worker("decode");
        decode.signal(Signal::STOP);
        let stopped = ask();
        decode.signal(Signal::CONT);
        stopped.only("reach", "error", "is registered, but its process does not answer", "kill -CONT");

        no_space(&etcd, AlarmAction::Activate).await;
        ask().only("etcd", "error", "the alarm NOSPACE is set", "etcdctl alarm disarm");
        no_space(&etcd, AlarmAction::Deactivate).await;
        etcd.kill((etcd.leader().unwrap_or(0) + 1) % 3);
        ask().only("etcd", "warning", "no answer", "start this etcd server again");
        etcd.kill_all();
        ask().only("etcd", "error", "0 of 3 endpoints answer", "start etcd");
        etcd.restart();
        ask().nothing();
    });
    doctor(&["--cluster", "http://127.0.0.1:9"]).only("reach", "error", "no answer from", "baton up");
}

#[test]
fn doctor_misses_a_role() {
    let _alone = alone();
    enough_files();
    let etcd = EtcdCluster::start(1);
    let endpoints = etcd.endpoints().join(",");
    block_on(async {
        let source = membership::connect(MembershipConfig::etcd(etcd.endpoints())).unwrap();
        let cluster = Cluster::up(&["--backend", "sim"]);
        let (_, status) = cluster.http.get("/status").await.unwrap();
        let status: Value = serde_json::from_slice(&status).unwrap();
        let prefill = status["members"].as_array().unwrap().iter().find(|m| m["role"] == "prefill").unwrap();
        let text = |key: &str| prefill[key].as_str().unwrap().to_owned();
        let alone = Member {
            id: text("id"),
            role: Role::Prefill as i32,
            address: text("address"),
            admin_address: text("admin"),
            ..Member::default()
        };
        let registration = source.join(alone);
        joined(&registration).await;
        doctor(&["--etcd", &endpoints]).only(
            "membership",
            "error",
            "no decode member takes work",
            "--role decode",
        );
    });
}

async fn joined(registration: &Registration) {
    timeout(Duration::from_secs(30), registration.joined()).await.expect("etcd takes the record");
}

/// Records put beside those of the real workers, as a worker that is not right would put them.
struct Records {
    source: Arc<dyn Membership>,
    decode: Member,
    url: String,
}

impl Records {
    async fn of(etcd: &EtcdCluster, cluster: &Cluster) -> Self {
        let source = membership::connect(MembershipConfig::etcd(etcd.endpoints())).unwrap();
        let mut views = source.watch();
        let view = views.wait_for(|view| view.members.len() == 2);
        let view = timeout(Duration::from_secs(30), view).await.expect("etcd answers").unwrap().clone();
        let decode = view.members.into_iter().find(|member| member.role() == Role::Decode).unwrap();
        Records { source, decode, url: cluster.url.clone() }
    }

    /// While `change`d record is there, known to the router too, what the doctor says.
    async fn told(&self, ask: &impl Fn() -> Told, change: impl FnOnce(&mut Member)) -> Told {
        let mut member = Member { id: "decode-planted".into(), pid: 0, ..self.decode.clone() };
        change(&mut member);
        let registration = self.source.join(member);
        joined(&registration).await;
        self.members(3).await;
        let told = ask();
        registration.leave().await;
        self.members(2).await;
        told
    }

    /// Waits until the router knows so many.
    async fn members(&self, expected: usize) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let client = crate::harness::client(&self.url);
        loop {
            let (_, body) = client.get("/status").await.unwrap();
            let status: Value = serde_json::from_slice(&body).unwrap();
            if status["members"].as_array().is_some_and(|members| members.len() == expected) {
                return;
            }
            assert!(Instant::now() < deadline, "the router does not see {expected} members: {status}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn foreign_members(records: &Records, ask: &impl Fn() -> Told) {
    let stub = Stub::start().await;
    // A port of its own that answers health checks, as nothing else shall be wrong with these.
    let elsewhere = |member: &mut Member| {
        member.address = stub.grpc.clone();
        member.admin_address = stub.admin.clone();
    };
    let told = records.told(ask, elsewhere).await;
    told.only("pairs", "error", "does not get through", "let prefill workers through");
    let told = records.told(ask, |_| {}).await;
    let same =
        |check: &str, part: &str| told.problems.iter().any(|[c, _, f, _]| c == check && f.contains(part));
    assert!(
        same("membership", "is the address of") && same("pairs", "answers at") && told.problems.len() == 2,
        "{told:#?}"
    );
    let nowhere = |member: &mut Member| member.address = "http://127.0.0.1:9".into();
    records.told(ask, nowhere).await.only(
        "reach",
        "error",
        "its gRPC port http://127.0.0.1:9",
        "correct `advertise`",
    );
    // Not reached from here, they are in no pair, so that only what differs is told of them.
    let mut skewed = Vec::new();
    let gone = |member: &mut Member| member.address = "http://127.0.0.1:9".into();
    type Change = (&'static str, &'static str, fn(&mut Member));
    let changes: [Change; 4] = [
        ("version differs", "same version", |member| member.version = "0.0.9".into()),
        ("weights differs", "same checkpoint", |member| member.weights_fingerprint ^= 1),
        ("layout differs", "same --transport", |member| member.layout_fingerprint ^= 1),
        ("block_tokens differs", "same block_tokens", |member| member.block_tokens = 16),
    ];
    for (found, remedy, change) in changes {
        let told = records
            .told(ask, |member| {
                gone(member);
                change(member);
            })
            .await;
        let skew: Vec<_> = told.problems.iter().filter(|[check, ..]| check == "skew").cloned().collect();
        assert_eq!((skew.len(), told.problems.len()), (1, 2), "{told:#?}");
        assert!(skew[0][2].contains(found) && skew[0][3].contains(remedy), "{skew:#?}");
        assert!(skew[0][2].contains("without a partner: decode-planted"), "{skew:#?}");
        skewed.push(told.code);
    }
    assert_eq!(skewed, [2; 4]);
}

/// Says that it is well, on both ports, and can do nothing.
struct Stub {
    grpc: String,
    admin: String,
}

impl Stub {
    async fn start() -> Self {
        let (grpc, admin) = (listen().await, listen().await);
        let (_, health) = tonic_health::server::health_reporter();
        let stub = Stub { grpc: url(&grpc), admin: url(&admin) };
        let incoming = tonic::transport::server::TcpIncoming::from(grpc);
        tokio::spawn(tonic::transport::Server::builder().add_service(health).serve_with_incoming(incoming));
        tokio::spawn(axum::serve(admin, Router::new().fallback(|| async { "ok\n" })).into_future());
        stub
    }
}

async fn listen() -> tokio::net::TcpListener {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn url(listener: &tokio::net::TcpListener) -> String {
    format!("http://{}", listener.local_addr().unwrap())
}

/// A gateway that answers as the real one does, years ago.
async fn a_clock_that_goes_wrong(cluster: &Cluster) {
    async fn pass(State(url): State<String>, uri: Uri) -> impl IntoResponse {
        let (_, body) = crate::harness::client(&url).get(uri.path()).await.unwrap();
        ([("date", "Sun, 06 Nov 1994 08:49:37 GMT")], body)
    }
    let listener = listen().await;
    let front = url(&listener);
    let app = Router::new().fallback(pass).with_state(cluster.url.clone());
    let served = tokio::spawn(axum::serve(listener, app).into_future());
    doctor(&["--cluster", &front]).only("clock", "error", "from this machine's", "time service");
    served.abort();
}

async fn no_space(etcd: &EtcdCluster, action: AlarmAction) {
    let mut client = etcd_client::Client::connect([&etcd.endpoints()[0]], None).await.unwrap();
    let mut options = AlarmOptions::new();
    options.with_member(client.status().await.unwrap().header().unwrap().member_id());
    client.alarm(action, AlarmType::Nospace, Some(options)).await.unwrap();
}
