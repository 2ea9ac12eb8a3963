//! What each endpoint of an etcd cluster says of itself, asked one by one: for finding out what is wrong, not for serving.
//! Asks nothing that needs a quorum, so that a minority can still be heard.

use super::EtcdTls;
use crate::Error;
use etcd_client::{Client, ConnectOptions};
use futures::future::join_all;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// One endpoint, as it answers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Endpoint {
    pub cluster: u64,
    pub member: u64,
    /// 0: it knows of none.
    pub leader: u64,
    pub version: String,
    pub db_bytes: u64,
    /// Servers before 3.6 do not tell.
    pub quota_bytes: Option<u64>,
    /// In etcd's words; alarms are among them.
    pub errors: Vec<String>,
    /// Of one question on a connection that stands.
    pub latency: Duration,
}

/// Asks every endpoint at the same time, each for at most `patience`.
pub async fn survey(
    urls: &[String],
    tls: Option<&EtcdTls>,
    patience: Duration,
) -> Vec<(String, Result<Endpoint, Error>)> {
    join_all(urls.iter().map(|url| async move {
        let answer = timeout(patience, ask(url, tls, patience)).await;
        (url.clone(), answer.unwrap_or(Err(Error::Silent(patience))))
    }))
    .await
}

async fn ask(url: &str, tls: Option<&EtcdTls>, patience: Duration) -> Result<Endpoint, Error> {
    let mut options = ConnectOptions::new().with_connect_timeout(patience);
    if let Some(tls) = tls {
        options = options.with_tls(tls.read()?);
    }
    let mut client = Client::connect([url], Some(options)).await?.maintenance_client();
    client.status().await?;
    let began = Instant::now();
    let status = client.status().await?;
    let latency = began.elapsed();
    let (cluster, member) =
        status.header().map_or((0, 0), |header| (header.cluster_id(), header.member_id()));
    Ok(Endpoint {
        cluster,
        member,
        leader: status.leader(),
        version: status.version().to_owned(),
        db_bytes: status.db_size().max(0) as u64,
        quota_bytes: u64::try_from(status.db_size_quota()).ok().filter(|quota| *quota > 0),
        errors: status.errors().to_vec(),
        latency,
    })
}
