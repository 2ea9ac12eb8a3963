//! etcd over TLS: a real server that demands client certificates, which the test makes with openssl.

use crate::etcd_cluster::{TRIES, choose_ports, directory, find_etcd, wait_until};
use membership::{Error, EtcdTls, MembershipConfig, connect};
use proto::Member;
use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::time::timeout;

/// For an election on a busy machine, with room.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn members_meet_over_tls_and_strangers_do_not() {
    let dir = directory();
    if !make_certificates(dir.path()) {
        println!("SKIPPED: etcd over TLS; install openssl, which makes the certificates");
        return;
    }
    let (_server, url) = Server::start(dir.path());
    let file = |name: &str| dir.path().join(name);
    let (cert, key) = (Some(file("client.crt")), Some(file("client.key")));
    let config = |tls| MembershipConfig { tls: Some(tls), ..MembershipConfig::etcd([url.clone()]) };
    let known = connect(config(EtcdTls { ca: file("ca.crt"), cert, key })).unwrap();
    let registration = known.join(Member { id: "m".into(), ..Member::default() });
    timeout(PATIENCE, registration.joined()).await.expect("joins with its certificate");
    let mut view = known.watch();
    let seen = view.wait_for(|view| view.members.iter().any(|member| member.id == "m"));
    timeout(PATIENCE, seen).await.expect("sees itself").unwrap();

    let stranger = connect(config(EtcdTls { ca: file("ca.crt"), cert: None, key: None })).unwrap();
    let unknown = stranger.join(Member { id: "stranger".into(), ..Member::default() });
    assert!(timeout(Duration::from_secs(2), unknown.joined()).await.is_err(), "etcd takes no stranger");
    assert_eq!(view.borrow().members.len(), 1);
}

/// What etcd refuses today it may take tomorrow: a connection is made with the files of the moment, not those of the first try.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_taken_up() {
    let dir = directory();
    if !make_certificates(dir.path()) {
        println!("SKIPPED: etcd over TLS; install openssl, which makes the certificates");
        return;
    }
    let (_server, url) = Server::start(dir.path());
    let file = |name: &str| dir.path().join(name);
    for end in ["crt", "key"] {
        fs::copy(file(&format!("stranger.{end}")), file(&format!("renewed.{end}"))).unwrap();
    }
    let (cert, key) = (Some(file("renewed.crt")), Some(file("renewed.key")));
    let tls = Some(EtcdTls { ca: file("ca.crt"), cert, key });
    let late = connect(MembershipConfig { tls, ..MembershipConfig::etcd([url]) }).unwrap();
    let registration = late.join(Member { id: "late".into(), ..Member::default() });
    assert!(
        timeout(Duration::from_secs(4), registration.joined()).await.is_err(),
        "etcd knows no such authority"
    );
    for end in ["crt", "key"] {
        fs::copy(file(&format!("client.{end}")), file(&format!("renewed.{end}"))).unwrap();
    }
    timeout(PATIENCE, registration.joined()).await.expect("joins with the certificate of the moment");
}

#[tokio::test]
async fn a_wrong_file_is_named_at_start() {
    let dir = TempDir::new().unwrap();
    let refused = |ca: &Path| {
        let tls = Some(EtcdTls { ca: ca.to_owned(), cert: None, key: None });
        match connect(MembershipConfig { tls, ..MembershipConfig::etcd(["https://a:1"]) }) {
            Err(error @ Error::Pem { .. }) => error.to_string(),
            _ => panic!("{} is taken", ca.display()),
        }
    };
    let absent = dir.path().join("absent.crt");
    assert!(refused(&absent).contains("absent.crt"));
    fs::write(&absent, "not PEM").unwrap();
    assert!(refused(&absent).contains("no -----BEGIN line"));
}

struct Server(Child);

impl Server {
    /// Once it listens.
    fn start(dir: &Path) -> (Self, String) {
        let started = (0..TRIES).find_map(|_| Server::try_start(dir, &choose_ports(2)));
        started.expect("etcd listens, on one of several ports")
    }

    /// `None` if it ended instead.
    fn try_start(dir: &Path, ports: &[u16]) -> Option<(Self, String)> {
        let client = ports[0];
        let mut server = Server::spawn(dir, client, &format!("http://127.0.0.1:{}", ports[1]));
        let mut listens = false;
        wait_until(PATIENCE, || {
            listens = TcpStream::connect((Ipv4Addr::LOCALHOST, client)).is_ok();
            listens || !matches!(server.0.try_wait(), Ok(None))
        });
        listens.then_some((server, format!("https://localhost:{client}")))
    }

    fn spawn(dir: &Path, port: u16, peer: &str) -> Self {
        let (listen, data) = (format!("https://127.0.0.1:{port}"), format!("of-{port}"));
        let flags = [
            ("--data-dir", data.as_str()),
            ("--listen-client-urls", &listen),
            ("--advertise-client-urls", &listen),
            ("--listen-peer-urls", peer),
            ("--initial-advertise-peer-urls", peer),
            ("--initial-cluster", &format!("default={peer}")),
            ("--cert-file", "server.crt"),
            ("--key-file", "server.key"),
            ("--trusted-ca-file", "ca.crt"),
            ("--client-cert-auth", "true"),
        ];
        let mut etcd = Command::new(find_etcd());
        etcd.args(flags.map(|(flag, value)| format!("{flag}={value}"))).current_dir(dir);
        let child = etcd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Server(child.expect("etcd starts"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An authority, a server and a client that it knows, and a stranger. False without openssl.
fn make_certificates(dir: &Path) -> bool {
    fs::write(
        dir.join("extensions"),
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n",
    )
    .unwrap();
    let openssl = |arguments: String| {
        let mut openssl = Command::new("openssl");
        openssl.args(arguments.split(' ')).current_dir(dir).stderr(Stdio::null()).stdout(Stdio::null());
        openssl.status().is_ok_and(|status| status.success())
    };
    let new = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(format!("{new} -x509 -days 2 -subj /CN=authority -keyout ca.key -out ca.crt"))
        && openssl(format!("{new} -x509 -days 2 -subj /CN=stranger -keyout stranger.key -out stranger.crt"))
        && ["server", "client"].into_iter().all(|who| {
            openssl(format!("{new} -subj /CN={who} -keyout {who}.key -out {who}.csr"))
                && openssl(format!(
                    "x509 -req -days 2 -in {who}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -extfile extensions -out {who}.crt"
                ))
        })
}
