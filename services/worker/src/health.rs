//! What the standard health service says of this worker: it serves, unless its engine has work and stands still. A router
//! that found it stuck asks here before it sends anything again.

use crate::shared::Shared;
use handoff::liveness::{Liveness, Verdict};
use proto::Heartbeat;
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};
use tonic_health::{ServingStatus, server::HealthReporter};

/// All services of the port.
const WHOLE: &str = "";

/// Never ends by itself.
pub async fn tell(shared: Arc<Shared>, health: HealthReporter) {
    let silence = Duration::from_millis(shared.config.liveness.silence_ms);
    let (start, mut liveness) = (Instant::now(), Liveness::new(silence, Duration::ZERO));
    loop {
        sleep(shared.heartbeat_every()).await;
        let Heartbeat { step, working, longest_step_ms } = shared.heartbeat();
        let longest = Duration::from_millis(longest_step_ms.into());
        liveness.heartbeat(step, working, longest, start.elapsed());
        let stuck = liveness.verdict(start.elapsed()) == Verdict::Stuck;
        let status = if stuck { ServingStatus::NotServing } else { ServingStatus::Serving };
        health.set_service_status(WHOLE, status).await;
    }
}
