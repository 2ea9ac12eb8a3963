//! The phases that a request's KV passes through, as places where a test can hold it: small models pass through
//! them in milliseconds, and a fault must find them there. Built with the feature `failpoints`, a process serves
//! `/debug/phases` on its admin port; without it, all of this is a future that is ready at once.

use axum::Router;
use std::future::Future;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Decode has reserved, prefill has not begun.
    Reserved,
    /// Prefill computes, nothing is on offer.
    Prefilling,
    /// Some blocks are on offer or accepted, the first token is not there.
    Offering,
    /// Decode has all blocks and the first token, and has not decoded.
    Committed,
    /// Decode has told tokens of its own.
    Decoding,
}

/// Does `work` once nobody holds `phase`. Cancel-safe if `work` is.
pub async fn after<T>(phase: Phase, work: impl Future<Output = T>) -> T {
    held::wait(phase).await;
    work.await
}

/// Where a test holds phases and lets them go.
pub fn routes() -> Router {
    held::routes()
}

#[cfg(not(feature = "failpoints"))]
mod held {
    pub async fn wait(_: super::Phase) {}

    pub fn routes() -> super::Router {
        super::Router::new()
    }
}

#[cfg(feature = "failpoints")]
mod held {
    use super::{Phase, Router};
    use axum::{Json, extract::Path, http::StatusCode, routing::get};
    use serde_json::Value;
    use std::sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    };
    use tokio::sync::watch;

    const PHASES: [(&str, Phase); 5] = [
        ("reserved", Phase::Reserved),
        ("prefilling", Phase::Prefilling),
        ("offering", Phase::Offering),
        ("committed", Phase::Committed),
        ("decoding", Phase::Decoding),
    ];

    static HELD: LazyLock<watch::Sender<[bool; 5]>> = LazyLock::new(watch::Sender::default);
    static WAITING: [AtomicU32; 5] = [const { AtomicU32::new(0) }; 5];

    struct Waiting(usize);

    impl Drop for Waiting {
        fn drop(&mut self) {
            WAITING[self.0].fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub async fn wait(phase: Phase) {
        let index = phase as usize;
        if !HELD.borrow()[index] {
            return;
        }
        WAITING[index].fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(index);
        let _ = HELD.subscribe().wait_for(|held| !held[index]).await;
    }

    /// `GET`: how many wait in each phase. `PUT` and `DELETE` of `/debug/phases/NAME`: hold it, let it go.
    pub fn routes() -> Router {
        let one =
            get(waiting).put(|name| async { hold(name, true) }).delete(|name| async { hold(name, false) });
        Router::new().route("/debug/phases", get(waiting)).route("/debug/phases/{name}", one)
    }

    async fn waiting() -> Json<Value> {
        let count = |phase: Phase| Value::from(WAITING[phase as usize].load(Ordering::Relaxed));
        Json(PHASES.iter().map(|(name, phase)| ((*name).to_owned(), count(*phase))).collect())
    }

    fn hold(Path(name): Path<String>, held: bool) -> (StatusCode, String) {
        let Some((_, phase)) = PHASES.into_iter().find(|(known, _)| *known == name) else {
            return (
                StatusCode::NOT_FOUND,
                format!("no phase {name}; there are: {:?}\n", PHASES.map(|p| p.0)),
            );
        };
        HELD.send_modify(|all| all[phase as usize] = held);
        (StatusCode::OK, String::new())
    }
}
