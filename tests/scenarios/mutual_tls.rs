//! A whole cluster over mutual TLS: it answers, strangers are let in nowhere, and its certificates, authority and all, are
//! replaced under load without the loss of a request.

use crate::harness::{
    Ask, Cluster, Worker, alone, block_on,
    certificates::{Authority, Files, Issued},
    golden,
    http::Client,
};
use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const PATIENCE: Duration = Duration::from_secs(60);
const CLIENTS: usize = 3;

fn up(files: &Files, more: &[&str]) -> Cluster {
    let mut arguments: Vec<String> = more.iter().map(|text| text.to_string()).collect();
    for set in ["--gateway-set", "--router-set", "--worker-set"] {
        for (key, name) in [("ca", "ca.crt"), ("cert", "tls.crt"), ("key", "tls.key")] {
            arguments.extend([set.to_owned(), format!("tls.{key}={}", files.path(name).display())]);
        }
    }
    Cluster::up(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn mutual_tls_whole_cluster_and_strangers() {
    let _alone = alone();
    let dir = TempDir::new().unwrap();
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let files = Files::new(dir.path(), &ours.pem(), &ours.issue("baton"));
    let cluster = up(&files, &["--threads", "1"]);
    block_on(async {
        for item in golden::golden().iter().take(3) {
            let answer = Ask::new(&item.prompt_ids, item.answer_ids.len()).send(&cluster).await.unwrap();
            assert_eq!(answer.ids, item.answer_ids);
        }
        let moved = cluster.metric(cluster.worker("decode"), "baton_handoff_bytes_total", "").await;
        assert!(moved > 0.0, "blocks went from prefill to decode");
        let trusting =
            || ClientTlsConfig::new().domain_name("baton").ca_certificate(Certificate::from_pem(ours.pem()));
        let with = |issued: Issued| trusting().identity(Identity::from_pem(issued.cert, issued.key));
        for service in cluster.workers.iter().chain([&cluster.router]) {
            assert!(service.grpc.starts_with("https://"), "{}", service.grpc);
            health(&service.grpc, Some(with(ours.issue("baton")))).await.expect("one of ours");
            let plain = service.grpc.replace("https://", "http://");
            for (who, address, tls) in [
                ("unsecured", &plain, None),
                ("without a certificate", &service.grpc, Some(trusting())),
                ("of another authority", &service.grpc, Some(with(theirs.issue("baton")))),
                ("of another name", &service.grpc, Some(with(ours.issue("etcd")))),
                ("expired", &service.grpc, Some(with(ours.issue_expired("baton")))),
            ] {
                health(address, tls).await.expect_err(&format!("{who}, {}", service.name));
            }
            let refused = cluster.metric(service, "baton_tls_connections_refused_total", "").await;
            assert!(refused >= 4.0, "{}: {refused}", service.name);
        }
        cluster.assert_idle().await;
    });
}

async fn health(address: &str, tls: Option<ClientTlsConfig>) -> Result<(), String> {
    let mut endpoint =
        Endpoint::from_shared(address.to_owned()).unwrap().connect_timeout(Duration::from_secs(5));
    if let Some(tls) = tls {
        endpoint = endpoint.tls_config(tls).map_err(|error| error.to_string())?;
    }
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let mut client = HealthClient::new(channel);
    let asked = client.check(HealthCheckRequest::default());
    let answer = timeout(Duration::from_secs(5), asked).await.map_err(|error| error.to_string())?;
    answer.map(drop).map_err(|status| status.to_string())
}

#[test]
fn mutual_tls_rotation_under_load_loses_nothing() {
    let _alone = alone();
    let dir = TempDir::new().unwrap();
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let before = old.issue("baton");
    let mut files = Files::new(dir.path(), &old.pem(), &before);
    let cluster = up(&files, &["--threads", "1", "--prefill", "2", "--decode", "2"]);
    let both = old.pem() + &new.pem();
    let after = new.issue("baton");
    block_on(async {
        let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
        let rotate = async {
            for (step, (ca, issued)) in
                [(&both, &before), (&both, &after), (&new.pem(), &after)].into_iter().enumerate()
            {
                files.replace(ca, issued);
                for service in cluster.services() {
                    taken(&cluster, service, step + 1).await;
                }
            }
            // One that comes now knows nothing of the old authority, nor does anybody of the old certificates.
            let former = cluster.worker("decode").clone();
            let left = Client::new(&former.admin).unwrap().post("/drain", "{}".into()).await.unwrap();
            assert!(left.0.is_success());
            let joined = async {
                while !four_of_which_not(&cluster, former.pid).await {
                    sleep(Duration::from_millis(50)).await;
                }
            };
            timeout(PATIENCE, joined).await.expect("its successor joins");
            sleep(Duration::from_secs(2)).await;
            stop.store(true, Ordering::Relaxed);
        };
        let load = |client: usize| load(&cluster, client, &stop, &served);
        tokio::join!(rotate, load(0), load(1), load(2));
        assert!(served.load(Ordering::Relaxed) > 10 * CLIENTS);
    });
}

async fn load(cluster: &Cluster, client: usize, stop: &AtomicBool, served: &AtomicUsize) {
    for item in golden::golden().iter().cycle().skip(client * 90) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let answer = Ask::new(&item.prompt_ids, item.answer_ids.len()).send(cluster).await;
        assert_eq!(answer.expect("no request is lost").ids, item.answer_ids);
        served.fetch_add(1, Ordering::Relaxed);
    }
}

async fn taken(cluster: &Cluster, service: &Worker, times: usize) {
    let taken = async {
        let labels = "outcome=\"taken\"";
        while cluster.metric(service, "baton_credentials_reloads_total", labels).await < times as f64 {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(PATIENCE, taken).await.unwrap_or_else(|_| panic!("{} has not taken the files up", service.name));
}

async fn four_of_which_not(cluster: &Cluster, former: u32) -> bool {
    let (_, body) = cluster.http.get("/status").await.unwrap();
    let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let members = status["members"].as_array().unwrap();
    members.len() == 4 && members.iter().all(|member| member["pid"] != former)
}
