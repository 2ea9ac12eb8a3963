//! Asks suspected members whether they live, over the same connections that requests take: only an answer ends
//! a suspicion. A member that keeps its lease and cannot be reached from here would otherwise fail one request
//! after the other.

use crate::{Shared, config::ms};
use futures::future::join_all;
use proto::Member;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Probes until cancelled.
pub async fn run(shared: &Shared) {
    let mut pace = interval(ms(shared.config.members.probe_ms));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        let suspects = shared.cluster.suspects();
        join_all(suspects.iter().map(|member| probe(shared, member))).await;
    }
}

async fn probe(shared: &Shared, member: &Member) {
    let patience = ms(shared.config.liveness.connect_ms);
    if timeout(patience, answers(shared, member)).await.unwrap_or(false) {
        tracing::info!(member = member.id, "a suspected member answers");
        shared.cluster.trust(&member.id);
    }
}

async fn answers(shared: &Shared, member: &Member) -> bool {
    let Ok(channel) = shared.channels.get(&member.address) else { return false };
    match HealthClient::new(channel).check(HealthCheckRequest::default()).await {
        Ok(reply) => reply.into_inner().status() == ServingStatus::Serving,
        // It says so itself.
        Err(status) => status.code() == Code::Unimplemented,
    }
}
