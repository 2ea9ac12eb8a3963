//! Mutual TLS over real sockets: who is let in, who is not, and certificates that change while connections live.

mod certificates;

use certificates::{Authority, Files, Issued};
use credentials::{Metrics, Patience, Tls, TlsConfig};
use std::{fs, net::SocketAddr, time::Duration};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// More than one look at the files.
const SEEN: Duration = Duration::from_secs(10);

fn config(files: &Files) -> TlsConfig {
    let [ca, cert, key] = ["ca.crt", "tls.crt", "tls.key"].map(|name| files.path(name));
    TlsConfig { ca, cert, key, server_name: "baton".into() }
}

fn open(files: &Files) -> (Tls, Metrics) {
    let metrics = Metrics::default();
    (Tls::open(&config(files), metrics.clone()).unwrap(), metrics)
}

/// A server with standard health.
async fn serve(tls: &Tls) -> SocketAddr {
    serve_within(tls, Patience::default()).await
}

async fn serve_within(tls: &Tls, patience: Patience) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_, health) = tonic_health::server::health_reporter();
    let incoming = tls.incoming_within(listener, patience);
    tokio::spawn(Server::builder().add_service(health).serve_with_incoming(incoming));
    address
}

async fn ask(channel: &Channel) -> Result<(), String> {
    let asked = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await;
    asked.map(drop).map_err(|status| format!("{status:?}"))
}

fn channel(tls: &Tls, to: SocketAddr) -> Channel {
    let dial = tls.dial();
    dial.channel(&dial.endpoint(&format!("https://{to}")).unwrap())
}

/// A client that is none of ours.
async fn foreign(to: SocketAddr, tls: ClientTlsConfig) -> Result<(), String> {
    let endpoint = Endpoint::from_shared(format!("https://{to}")).unwrap();
    ask(&endpoint.tls_config(tls.domain_name("baton")).unwrap().connect_lazy()).await
}

fn identity(issued: &Issued) -> Identity {
    Identity::from_pem(&issued.cert, &issued.key)
}

#[tokio::test]
async fn only_who_shows_a_certificate_of_the_authority_is_let_in() {
    let dir = TempDir::new().unwrap();
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (tls, _) = open(&Files::new(dir.path(), &ours.pem(), &ours.issue("baton")));
    let address = serve(&tls).await;
    ask(&channel(&tls, address)).await.expect("one of us");
    let trusting = || ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ours.pem()));
    foreign(address, trusting().identity(identity(&ours.issue("baton")))).await.expect("of the authority");
    let error = foreign(address, trusting().identity(identity(&ours.issue("etcd")))).await;
    error.expect_err("of the authority, for somebody else");
    foreign(address, trusting()).await.expect_err("without a certificate");
    let error = foreign(address, trusting().identity(identity(&ours.issue_expired("baton")))).await;
    error.expect_err("with an expired one");
    let error = foreign(address, trusting().identity(identity(&theirs.issue("baton")))).await;
    error.expect_err("with one of another authority");
    let plain = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    ask(&plain).await.expect_err("unsecured");
    ask(&channel(&tls, address)).await.expect("others are not disturbed");
}

#[tokio::test]
async fn a_server_that_is_none_of_ours_hears_nothing() {
    let (one, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (tls, _) = open(&Files::new(one.path(), &ours.pem(), &ours.issue("baton")));
    // It would take anybody whom either authority has signed, but can show only what the other has.
    let both = ours.pem() + &theirs.pem();
    let (impostor, _) = open(&Files::new(other.path(), &both, &theirs.issue("baton")));
    let error = ask(&channel(&tls, serve(&impostor).await)).await.unwrap_err();
    assert!(error.contains("UnknownIssuer") || error.contains("certificate"), "{error}");
}

#[tokio::test]
async fn who_says_nothing_holds_up_nobody() {
    let dir = TempDir::new().unwrap();
    let ours = Authority::new("ours");
    let (tls, metrics) = open(&Files::new(dir.path(), &ours.pem(), &ours.issue("baton")));
    let patience = Patience { longest: Duration::from_secs(12), fair: Duration::from_secs(1) };
    let address = serve_within(&tls, patience).await;
    let mut mute = Vec::new();
    // More than may shake hands at the same time.
    for _ in 0..300 {
        mute.push(TcpStream::connect(address).await.unwrap());
    }
    let answered = timeout(Duration::from_secs(10), async { ask(&channel(&tls, address)).await });
    answered.await.expect("once the first have had their time").unwrap();
    let mut end_of = async |index: usize, patience| {
        let ended = timeout(patience, mute[index].read(&mut [0; 1])).await;
        assert_eq!(ended.expect("given up").unwrap_or(0), 0);
    };
    end_of(0, Duration::from_secs(2)).await;
    end_of(299, Duration::from_secs(24)).await;
    let mut loud = TcpStream::connect(address).await.unwrap();
    loud.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let refused = async {
        while metrics.connections_refused() < 301 {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let all = timeout(Duration::from_secs(10), refused).await;
    assert!(all.is_ok(), "{} were refused", metrics.connections_refused());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_come_at_once_all_get_in() {
    let dir = TempDir::new().unwrap();
    let ours = Authority::new("ours");
    let (tls, metrics) = open(&Files::new(dir.path(), &ours.pem(), &ours.issue("baton")));
    let patience = Patience { longest: Duration::from_secs(60), fair: Duration::from_secs(60) };
    let address = serve_within(&tls, patience).await;
    let one = || async { ask(&channel(&tls, address)).await };
    let answers = futures::future::join_all((0..300).map(|_| one())).await;
    let failed: Vec<_> = answers.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed.first());
    assert_eq!(metrics.connections_refused(), 0);
}

/// A new authority in three steps, as it is done without a pause: both are known; the new one's certificates; the old is gone.
#[tokio::test]
async fn an_authority_is_replaced_while_connections_live() {
    let dir = TempDir::new().unwrap();
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let before = old.issue("baton");
    let mut files = Files::new(dir.path(), &old.pem(), &before);
    let (tls, metrics) = open(&files);
    let address = serve(&tls).await;
    let first = channel(&tls, address);
    ask(&first).await.unwrap();
    let both = old.pem() + &new.pem();
    let after = new.issue("baton");
    for (step, (ca, issued)) in
        [(&both, &before), (&both, &after), (&new.pem(), &after)].into_iter().enumerate()
    {
        files.replace(ca, issued);
        taken(&metrics, step as u64 + 1).await;
        ask(&first).await.expect("a connection that is open stays");
        ask(&channel(&tls, address)).await.expect("and new ones come");
    }
    let of_old = |tls: ClientTlsConfig| tls.identity(identity(&old.issue("baton")));
    let trusting = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(new.pem()));
    foreign(address, of_old(trusting)).await.expect_err("the old authority is nobody now");
    // What cannot be used is not taken.
    files.replace(&new.pem(), &new.issue_expired("baton"));
    let stale = async {
        while !metrics.is_stale("tls") {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SEEN, stale).await.expect("is said");
    ask(&channel(&tls, address)).await.expect("the former certificate still serves");
}

async fn taken(metrics: &Metrics, times: u64) {
    let taken = async {
        while metrics.reloads("tls", "taken") < times {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(SEEN, taken).await.expect("the files are taken up");
}

#[tokio::test]
async fn files_that_nobody_would_believe_are_refused_at_start() {
    let dir = TempDir::new().unwrap();
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let good = ours.issue("baton");
    let key_of_another = Issued { cert: good.cert.clone(), key: ours.issue("baton").key };
    let broken = Issued { cert: "none".into(), key: good.key.clone() };
    for (name, ca, issued, part) in [
        ("expired", &ours, &ours.issue_expired("baton"), "Expired"),
        ("foreign", &ours, &theirs.issue("baton"), "UnknownIssuer"),
        ("unnamed", &ours, &ours.issue("other"), "NotValidForName"),
        ("mixed", &ours, &key_of_another, "cert and key"),
        ("broken", &ours, &broken, "no certificate in PEM"),
    ] {
        let files = Files::new(&dir.path().join(name), &ca.pem(), issued);
        let error = Tls::open(&config(&files), Metrics::default()).err().expect(name).to_string();
        let found = error.to_lowercase().replace(' ', "").contains(&part.to_lowercase().replace(' ', ""));
        assert!(found || error.contains("not valid for name"), "{name}: {error}");
    }
    let files = Files::new(&dir.path().join("absent"), &ours.pem(), &good);
    fs::remove_file(files.path("tls.key")).unwrap();
    let error = Tls::open(&config(&files), Metrics::default()).err().unwrap().to_string();
    assert!(error.contains("tls.key"), "{error}");
}
