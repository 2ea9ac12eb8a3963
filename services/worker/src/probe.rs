//! Whether this worker reaches another one's gRPC port, and how fast: `POST /probe?to=URL&mib=N` on the admin port sends
//! that much over the connection that hand-offs take. Only to a member of the cluster, bounded in size and time, one at a time
//! with a pause after each, so that it cannot be used to disturb: neither this worker nor the one it is pointed at, nor others.

use crate::{channels::Channels, pool::Current, shared::Shared};
use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use proto::{
    ProbeChunk, ProbeReply,
    reach_client::ReachClient,
    reach_server::{Reach, ReachServer},
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::{future::Future, sync::Arc, time::Duration};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, sleep, timeout},
};
use tonic::{Request, Status, Streaming, transport::Channel};

/// Most that one transfer may carry.
const MOST_MIB: u32 = 32;
/// One message, about a KV block.
const CHUNK: usize = 1 << 20;
/// Longest that a probe may take, on either side.
const LONGEST: Duration = Duration::from_secs(10);
/// For the membership's source to say who is a member now.
const VIEW: Duration = Duration::from_secs(2);
/// After a probe, before the next one may begin.
const PAUSE: Duration = Duration::from_millis(100);
/// Empty calls, of which the fastest is the round trip. The first one also opens the connection.
const ROUND_TRIPS: u32 = 4;
/// Transfers, of which the fastest counts: the first ones also open the connection's windows.
const TRANSFERS: u32 = 3;
/// Probes received at the same time.
const RECEIVED: usize = 4;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    /// gRPC address of the worker to reach, as its record as a member has it.
    to: String,
    #[serde(default = "some_mib")]
    mib: u32,
}

fn some_mib() -> u32 {
    4
}

#[derive(Clone)]
struct Prober {
    current: Current,
    place: Arc<Semaphore>,
}

pub fn router(current: Current) -> Router {
    let prober = Prober { current, place: Arc::new(Semaphore::new(1)) };
    Router::new().route("/probe", post(probe)).with_state(prober)
}

/// With which status and why there is no answer.
type Refusal = (StatusCode, String);

async fn probe(State(prober): State<Prober>, Query(asked): Query<Asked>) -> Response {
    match prober.answer(asked).await {
        Ok(found) => Json(found).into_response(),
        Err((status, error)) => (status, Json(json!({ "error": error }))).into_response(),
    }
}

impl Prober {
    async fn answer(self, asked: Asked) -> Result<Value, Refusal> {
        if asked.mib > MOST_MIB {
            let why = format!("mib is {}, but may be at most {MOST_MIB}", asked.mib);
            return Err((StatusCode::BAD_REQUEST, why));
        }
        let unavailable = |why: &str| (StatusCode::SERVICE_UNAVAILABLE, why.to_owned());
        let shared =
            self.current.borrow().clone().ok_or_else(|| unavailable("the engine has not started"))?;
        let busy = "another probe is under way; ask again shortly";
        let place =
            self.place.try_acquire_owned().map_err(|_| (StatusCode::TOO_MANY_REQUESTS, busy.into()))?;
        let found = in_turn(place, async move { reach(&shared, &asked).await }).await;
        found.unwrap_or_else(|| Err(unavailable("the worker is stopping")))
    }
}

/// `None`: the runtime ends. Work for which nobody waits any more ends early, and the pause comes after it all the same: who
/// leaves at once gains nothing.
async fn in_turn<T: Send + 'static>(
    place: OwnedSemaphorePermit,
    work: impl Future<Output = T> + Send + 'static,
) -> Option<T> {
    let (mut tell, told) = oneshot::channel();
    tokio::spawn(async move {
        tokio::select! {
            () = tell.closed() => {}
            done = work => drop(tell.send(done)),
        }
        sleep(PAUSE).await;
        drop(place);
    });
    told.await.ok()
}

async fn reach(shared: &Shared, asked: &Asked) -> Result<Value, Refusal> {
    check_member(shared, &asked.to).await?;
    let found = measure(&shared.channels, asked).await.map_err(|why| (StatusCode::BAD_GATEWAY, why))?;
    Ok(json!({
        "from": shared.id,
        "member": found.member,
        "to": asked.to,
        "bytes": found.bytes,
        "round_trip_ms": found.round_trip.as_secs_f64() * 1e3,
        "gigabytes_per_second": found.bytes as f64 / 1e9 / found.carried.as_secs_f64(),
    }))
}

/// Nobody can have this worker knock at doors of his choice. The members are asked for each time: to follow them always, for
/// this alone, would cost every worker as much as a router.
async fn check_member(shared: &Shared, address: &str) -> Result<(), Refusal> {
    let unavailable = |why| (StatusCode::SERVICE_UNAVAILABLE, why);
    let membership = membership::connect_by(shared.config.membership.clone(), shared.channels.dial())
        .map_err(|error| unavailable(error.to_string()))?;
    let mut views = membership.watch();
    let view = timeout(VIEW, views.wait_for(|view| view.connected)).await;
    let Ok(Ok(view)) = view else {
        return Err(unavailable(format!(
            "the membership's source did not say within {VIEW:?} who is a member"
        )));
    };
    match view.members.iter().any(|member| member.address == address) {
        true => Ok(()),
        false => {
            Err((StatusCode::NOT_FOUND, format!("{address:?} is the address of no member of this cluster")))
        }
    }
}

struct Found {
    member: String,
    bytes: u64,
    round_trip: Duration,
    /// From the first byte sent to the answer.
    carried: Duration,
}

async fn measure(channels: &Channels, asked: &Asked) -> Result<Found, String> {
    let channel = channels.once(&asked.to).map_err(|error| error.to_string())?;
    match timeout(LONGEST, carry(ReachClient::new(channel), asked.mib)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(status)) => Err(format!("{}: {} ({})", asked.to, innermost(&status), status.code())),
        Err(_) => Err(format!("{}: no answer within {LONGEST:?}", asked.to)),
    }
}

async fn carry(mut client: ReachClient<Channel>, mib: u32) -> Result<Found, Status> {
    let mut round_trip = LONGEST;
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        client.probe(tokio_stream::empty()).await?;
        round_trip = round_trip.min(began.elapsed());
    }
    let mut found = send(&mut client, mib).await?;
    for _ in 1..TRANSFERS {
        let again = send(&mut client, mib).await?;
        found = if again.carried < found.carried { again } else { found };
    }
    Ok(Found { round_trip, ..found })
}

async fn send(client: &mut ReachClient<Channel>, mib: u32) -> Result<Found, Status> {
    let payload = Bytes::from(vec![0x5a; CHUNK]);
    let chunks = (0..mib).map(move |_| ProbeChunk { payload: payload.clone() });
    let began = Instant::now();
    let reply = client.probe(tokio_stream::iter(chunks)).await?.into_inner();
    Ok(Found { member: reply.member, bytes: reply.bytes, round_trip: LONGEST, carried: began.elapsed() })
}

/// The cause at the bottom: what stands above it says only that there was one.
fn innermost(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause.is::<Status>() {
        true => status.message().to_owned(),
        false => cause.to_string(),
    }
}

/// The receiving side.
pub struct ReachService {
    shared: Arc<Shared>,
    places: Semaphore,
}

impl ReachService {
    pub fn server(shared: Arc<Shared>) -> ReachServer<Self> {
        ReachServer::new(ReachService { shared, places: Semaphore::new(RECEIVED) })
    }
}

#[tonic::async_trait]
impl Reach for ReachService {
    async fn probe(
        &self,
        request: Request<Streaming<ProbeChunk>>,
    ) -> Result<tonic::Response<ProbeReply>, Status> {
        let busy = |_| Status::resource_exhausted("other probes are under way here; try again shortly");
        let _place = self.places.try_acquire().map_err(busy)?;
        let late = |_| Status::deadline_exceeded(format!("the probe took longer than {LONGEST:?}"));
        let bytes = timeout(LONGEST, count(request.into_inner())).await.map_err(late)??;
        Ok(tonic::Response::new(ProbeReply { member: self.shared.id.clone(), bytes }))
    }
}

async fn count(mut chunks: Streaming<ProbeChunk>) -> Result<u64, Status> {
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await? {
        bytes += chunk.payload.len() as u64;
        if bytes > u64::from(MOST_MIB) << 20 {
            return Err(Status::out_of_range(format!("a probe carries at most {MOST_MIB} MiB")));
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::future::pending;

    #[tokio::test(start_paused = true)]
    async fn the_pause_comes_after_every_probe_however_it_ends() {
        let places = Arc::new(Semaphore::new(1));
        let place = || places.clone().try_acquire_owned().unwrap();
        assert_eq!(in_turn(place(), async { 7 }).await, Some(7));
        assert_eq!(places.available_permits(), 0);
        sleep(2 * PAUSE).await;
        // Who asked has left before there was an answer.
        assert!(in_turn(place(), pending::<()>()).now_or_never().is_none());
        sleep(PAUSE / 2).await;
        assert_eq!(places.available_permits(), 0);
        sleep(PAUSE).await;
        assert_eq!(places.available_permits(), 1);
    }
}
