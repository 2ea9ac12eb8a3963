//! `POST /drain` on the admin port: tells this worker to leave the cluster, as SIGTERM does. `?member=ID` says who is meant: an
//! address may be that of one that has taken the place of another.

use axum::{
    Json, Router,
    extract::{Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

#[derive(Clone)]
struct Leaver {
    id: String,
    asked: CancellationToken,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Meant {
    /// Absent: whoever is here.
    member: Option<String>,
}

pub fn router(id: &str, asked: CancellationToken) -> Router {
    Router::new().route("/drain", post(leave)).with_state(Leaver { id: id.to_owned(), asked })
}

async fn leave(State(leaver): State<Leaver>, Query(meant): Query<Meant>) -> Response {
    if meant.member.is_some_and(|member| member != leaver.id) {
        tracing::warn!("asked to leave in the place of another member");
        return (StatusCode::CONFLICT, other(&leaver.id)).into_response();
    }
    tracing::info!("asked to leave");
    leaver.asked.cancel();
    (StatusCode::ACCEPTED, Json(reply())).into_response()
}

fn other(id: &str) -> String {
    format!("this is {id}, and goes on: another member was meant; look at /status who is there now\n")
}

fn reply() -> Value {
    json!({ "pid": std::process::id(), "draining": true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::to_bytes;

    /// Status and words of the answer to `POST path`, and whether the worker leaves.
    async fn asked(path: &str) -> (u16, String, bool) {
        let leaver = Leaver { id: "decode-2".into(), asked: CancellationToken::new() };
        let meant = Query::try_from_uri(&path.parse().unwrap()).unwrap();
        let response = leave(State(leaver.clone()), meant).await;
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body(), 1 << 10).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap(), leaver.asked.is_cancelled())
    }

    #[tokio::test]
    async fn only_the_one_that_is_meant_leaves() {
        let (status, said, left) = asked("/drain?member=decode-1").await;
        assert!((status, left) == (409, false) && said.contains("this is decode-2"), "{status}: {said}");
        for path in ["/drain", "/drain?member=decode-2"] {
            let (status, said, left) = asked(path).await;
            assert_eq!((status, left), (202, true), "{path}: {said}");
        }
    }
}
