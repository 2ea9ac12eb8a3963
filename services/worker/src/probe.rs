//! Whether this worker reaches another one's gRPC port, and how fast: `POST /probe?to=URL&mib=N` on the admin port sends
//! that much over the connection that hand-offs take. Bounded in size and time, one at a time with a pause after each, so
//! that it cannot be used to disturb: neither this worker nor the one it is pointed at.

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
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tonic::{Request, Status, Streaming, transport::Channel};

/// Most that one transfer may carry.
const MOST_MIB: u32 = 32;
/// One message, about a KV block.
const CHUNK: usize = 1 << 20;
/// Longest that a probe may take, on either side.
const LONGEST: Duration = Duration::from_secs(10);
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
    /// gRPC address of the worker to reach.
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

async fn probe(State(prober): State<Prober>, Query(asked): Query<Asked>) -> Response {
    if asked.mib > MOST_MIB {
        return refused(
            StatusCode::BAD_REQUEST,
            format!("mib is {}, but may be at most {MOST_MIB}", asked.mib),
        );
    }
    let Some(shared) = prober.current.borrow().clone() else {
        return refused(StatusCode::SERVICE_UNAVAILABLE, "the engine has not started".into());
    };
    let Ok(place) = prober.place.try_acquire_owned() else {
        return refused(
            StatusCode::TOO_MANY_REQUESTS,
            "another probe is under way; ask again shortly".into(),
        );
    };
    let found = measure(&shared.channels, &asked).await;
    tokio::spawn(rest(place));
    match found {
        Ok(Found { member, bytes, round_trip, carried }) => Json(json!({
            "from": shared.id,
            "member": member,
            "to": asked.to,
            "bytes": bytes,
            "round_trip_ms": round_trip.as_secs_f64() * 1e3,
            "gigabytes_per_second": bytes as f64 / 1e9 / carried.as_secs_f64(),
        }))
        .into_response(),
        Err(why) => refused(StatusCode::BAD_GATEWAY, why),
    }
}

async fn rest(place: OwnedSemaphorePermit) {
    sleep(PAUSE).await;
    drop(place);
}

fn refused(status: StatusCode, error: String) -> Response {
    (status, Json(json!({ "error": error }))).into_response()
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
