//! What the routers say, asked by one task for all who want to know: readiness, status, history. One question is under way at
//! a time and few begin in a second, however many ask this gateway, and none hangs on whether who asked is still there.

use crate::cluster::Seen;
use proto::{Error, ErrorCode};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

/// From one look to the next when nobody asks.
const PACE: Duration = Duration::from_secs(1);
/// The same when somebody does.
const LEAST: Duration = Duration::from_millis(200);
/// For a look that is under way and the next one.
const PATIENCE: Duration = Duration::from_secs(5);

pub type Found = Result<Arc<Seen>, Error>;

struct Look {
    began: Instant,
    found: Found,
}

#[derive(Default)]
pub struct Looks {
    wanted: Notify,
    latest: watch::Sender<Option<Look>>,
}

impl Looks {
    /// Looks again and again. Never ends.
    pub async fn keep<F: Future<Output = Found>>(&self, look: impl Fn() -> F) {
        loop {
            let began = Instant::now();
            let found = look().await;
            self.latest.send_replace(Some(Look { began, found }));
            sleep(LEAST).await;
            let _ = timeout(PACE - LEAST, self.wanted.notified()).await;
        }
    }

    /// What a look finds that begins after this call.
    pub async fn fresh(&self) -> Found {
        let (asked, mut latest) = (Instant::now(), self.latest.subscribe());
        self.wanted.notify_one();
        let begun = |look: &Option<Look>| look.as_ref().is_some_and(|look| look.began >= asked);
        match timeout(PATIENCE, latest.wait_for(begun)).await {
            Ok(Ok(look)) => look.as_ref().map_or_else(unknown, |look| look.found.clone()),
            _ => unknown(),
        }
    }
}

fn unknown() -> Found {
    let message =
        format!("the routers were not asked within {} s; is this gateway stopping?", PATIENCE.as_secs());
    Err(Error::new(ErrorCode::NoMembers, message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;
    use proto::StatusReply;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    /// Looks that take 50 ms, each finding one more running request; and how many there were.
    fn looks() -> (Arc<Looks>, Arc<AtomicU32>) {
        let (looks, count) = (Arc::new(Looks::default()), Arc::new(AtomicU32::new(0)));
        let (kept, counted) = (looks.clone(), count.clone());
        let look = move || {
            let running = counted.fetch_add(1, SeqCst) + 1;
            async move {
                sleep(Duration::from_millis(50)).await;
                let status = StatusReply { running, ..StatusReply::default() };
                Ok(Arc::new(Seen { status, routers: Vec::new(), silent: Vec::new() }))
            }
        };
        tokio::spawn(async move { kept.keep(look).await });
        (looks, count)
    }

    #[tokio::test(start_paused = true)]
    async fn thousands_who_ask_at_once_share_one_look_and_see_what_is_now() {
        let (looks, count) = looks();
        sleep(Duration::from_millis(10)).await;
        let began = Instant::now();
        let found = join_all((0..2000).map(|_| looks.fresh())).await;
        assert!(found.iter().all(|found| found.as_ref().unwrap().status.running == 2), "not the one before");
        assert_eq!(count.load(SeqCst), 2);
        assert!(began.elapsed() < Duration::from_millis(300));
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_and_leaves_makes_no_more_looks() {
        let (looks, count) = looks();
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            let _ = timeout(Duration::from_millis(1), looks.fresh()).await;
        }
        let asked = count.swap(0, SeqCst);
        assert!((39..=41).contains(&asked), "{asked}");
        sleep(Duration::from_secs(105)).await;
        let unasked = count.load(SeqCst);
        assert!((99..=101).contains(&unasked), "{unasked}");
    }

    #[tokio::test(start_paused = true)]
    async fn where_nobody_looks_the_wait_ends() {
        assert!(Looks::default().fresh().await.err().unwrap().message.contains("not asked within 5 s"));
    }
}
