//! What both sources promise, written once.

use membership::{Membership, Registration, View};
use proto::{Load, Member, Role};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    runtime,
    sync::watch::Receiver,
    time::{sleep, timeout},
};

/// What a loaded machine may need on top of what is promised.
pub const MARGIN: Duration = Duration::from_secs(5);

pub trait Source {
    const LEASE: Duration;
    /// Well before any lease could have run out.
    const AT_ONCE: Duration = Self::LEASE.saturating_mul(3).checked_div(4).unwrap();
    /// When a lease that nobody renews has run out.
    const BEYOND: Duration = Self::LEASE.saturating_mul(3).checked_div(2).unwrap();
    /// A new client, with connections of its own.
    fn client(&self) -> Arc<dyn Membership>;
    /// Abrupt: no stream is closed properly.
    fn stop(&mut self);
    /// At the same address.
    fn start_again(&mut self);
}

pub fn member(id: &str) -> Member {
    Member {
        id: id.into(),
        role: Role::Decode.into(),
        address: format!("http://{id}:9000"),
        ..Member::default()
    }
}

pub fn ids(view: &View) -> Vec<&str> {
    view.members.iter().map(|member| member.id.as_str()).collect()
}

pub fn find<'a>(view: &'a View, id: &str) -> Option<&'a Member> {
    view.members.iter().find(|member| member.id == id)
}

/// Waits for a view; panics with the last one if it does not come.
pub async fn until(
    view: &mut Receiver<View>,
    limit: Duration,
    what: &str,
    wanted: impl FnMut(&View) -> bool,
) {
    let start = Instant::now();
    let waited = timeout(limit, view.wait_for(wanted)).await.is_ok();
    let took = start.elapsed();
    assert!(waited, "not {what} within {took:?}: {:?}", view.borrow());
}

pub async fn joined(registration: &Registration) {
    let joined = timeout(MARGIN, registration.joined()).await;
    joined.expect("a join becomes visible");
}

fn running(view: &View, id: &str) -> u32 {
    let load = find(view, id).and_then(|member| member.load);
    load.unwrap_or_default().running
}

pub fn set_running(registration: &Registration, running: u32) {
    registration.update(|member| {
        member.load = Some(Load { running, ..Load::default() });
    });
}

/// A member with a runtime of its own that can die without a word, like a process.
struct Mortal {
    runtime: runtime::Runtime,
}

impl Mortal {
    fn join(client: impl FnOnce() -> Arc<dyn Membership> + Send + 'static, id: &str) -> Self {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let member = member(id);
        runtime.spawn(async move {
            let _registration = client().join(member);
            std::future::pending::<()>().await;
        });
        Self { runtime }
    }

    fn kill(self) {
        self.runtime.shutdown_background();
    }
}

pub async fn members_appear_change_and_leave<S: Source>(source: &mut S) {
    let (a, b) = (source.client(), source.client());
    let mut views = [a.watch(), b.watch()];
    let one = a.join(member("one"));
    let two = b.join(member("two"));
    joined(&one).await;
    joined(&two).await;
    let late = source.client();
    for view in views.iter_mut().chain([&mut late.watch()]) {
        until(view, S::AT_ONCE, "both there", |view| ids(view) == ["one", "two"] && view.connected).await;
        assert_eq!(find(&view.borrow(), "one"), Some(&member("one")));
    }

    // Far more updates than anything could send; the last one counts, and the id stays.
    for running in 1..=10_000 {
        set_running(&one, running);
    }
    one.update(|member| member.id = "other".into());
    two.update(|member| member.draining = true);
    for view in &mut views {
        until(view, S::AT_ONCE, "updated", |view| {
            running(view, "one") == 10_000 && find(view, "two").is_some_and(|two| two.draining)
        })
        .await;
        assert_eq!(ids(&view.borrow()), ["one", "two"]);
    }

    one.leave().await;
    for view in &mut views {
        until(view, S::AT_ONCE, "left", |view| ids(view) == ["two"]).await;
    }
    drop(two);
    for view in &mut views {
        until(view, S::AT_ONCE, "dropped", |view| view.members.is_empty()).await;
        assert_eq!(view.borrow().left, ["two"], "one did not drain");
    }

    // Too quick for anybody to have seen it draining.
    let three = a.join(member("three"));
    joined(&three).await;
    until(&mut views[1], S::AT_ONCE, "back", |view| ids(view) == ["three"]).await;
    three.update(|member| member.draining = true);
    three.leave().await;
    until(&mut views[1], S::AT_ONCE, "left", |view| {
        view.members.is_empty() && view.left.contains(&"three".into())
    })
    .await;
}

pub async fn every_view_is_whole<S: Source>(source: &mut S) {
    let client = source.client();
    let steady: Vec<_> = (10..40).map(|n| client.join(member(&format!("m{n}")))).collect();
    for registration in &steady {
        joined(registration).await;
    }
    let observer = source.client();
    let mut view = observer.watch();
    until(&mut view, S::AT_ONCE, "complete", |view| view.connected).await;
    let mut revision = 0;
    for round in 1..=10 {
        let guest = client.join(member(&format!("guest{round}")));
        steady.iter().for_each(|registration| set_running(registration, round));
        while !(running(&view.borrow(), "m39") == round && view.borrow().members.len() == 31) {
            timeout(MARGIN, view.changed()).await.expect("changes arrive").unwrap();
            let view = view.borrow_and_update();
            assert!(view.revision > revision && view.members.is_sorted_by_key(|m| &m.id));
            assert!(ids(&view).iter().filter(|id| id.starts_with('m')).count() == 30);
            revision = view.revision;
        }
        guest.leave().await;
        let gone = |view: &View| view.members.len() == 30;
        until(&mut view, S::AT_ONCE, "guest gone", gone).await;
        revision = view.borrow_and_update().revision;
    }
}

pub async fn a_killed_member_goes_within_its_lease<S: Source>(source: &mut S) {
    let client = source.client();
    let mut view = client.watch();
    let steady = client.join(member("steady"));
    joined(&steady).await;
    let victim = source.client();
    let victim = Mortal::join(move || victim, "victim");
    until(&mut view, MARGIN, "victim there", |view| ids(view) == ["steady", "victim"]).await;
    // It renews: alive beyond its lease.
    sleep(S::BEYOND).await;
    assert_eq!(ids(&view.borrow()), ["steady", "victim"]);
    victim.kill();
    let killed = Instant::now();
    until(&mut view, S::LEASE + MARGIN, "victim gone", |view| ids(view) == ["steady"]).await;
    // A broken connection is no leave: its owner may come back by another.
    let lived = killed.elapsed();
    assert!(lived > S::LEASE / 4, "gone {lived:?} after its death");
}

pub async fn the_later_join_with_an_id_wins<S: Source>(source: &mut S) {
    let (a, b, observer) = (source.client(), source.client(), source.client());
    let mut view = observer.watch();
    let first = a.join(member("same"));
    joined(&first).await;
    let address = "http://later:1".to_owned();
    let later = Member { address: address.clone(), ..member("same") };
    let later = b.join(later);
    joined(&later).await;
    let is_later = |view: &View| view.members.len() == 1 && view.members[0].address == address;
    until(&mut view, S::AT_ONCE, "taken over", is_later).await;
    set_running(&first, 7);
    // Neither the update nor any renewal of the first may show, not even for a moment.
    let mut shown = view.clone();
    let changed = shown.wait_for(|view| !is_later(view) || running(view, "same") != 0);
    let changed = timeout(S::LEASE + S::AT_ONCE, changed).await;
    assert!(changed.is_err(), "{changed:?}");
    drop(first);
    set_running(&later, 9);
    until(&mut view, S::AT_ONCE, "updated", |view| running(view, "same") == 9).await;
    assert!(is_later(&view.borrow()));
    later.leave().await;
    until(&mut view, S::AT_ONCE, "left", |view| view.members.is_empty()).await;
}

pub async fn an_outage_changes_nothing_but_joins_wait<S: Source>(source: &mut S) {
    let (a, b) = (source.client(), source.client());
    let mut view = b.watch();
    let (one, two) = (a.join(member("one")), b.join(member("two")));
    let victim = source.client();
    let victim = Mortal::join(move || victim, "victim");
    joined(&one).await;
    joined(&two).await;
    let all = ["one", "two", "victim"];
    until(&mut view, MARGIN, "all there", |view| ids(view) == all).await;
    let shrunk = tokio::spawn(shrinks(b.watch()));

    source.stop();
    until(&mut view, S::LEASE + MARGIN, "disconnected", |view| !view.connected).await;
    victim.kill();
    let late = a.join(member("late"));
    set_running(&one, 5);
    sleep(S::BEYOND).await;
    assert_eq!(ids(&view.borrow()), all);
    assert!(timeout(Duration::ZERO, late.joined()).await.is_err());
    assert!(source.client().watch().borrow().members.is_empty());

    source.start_again();
    until(&mut view, MARGIN, "connected", |view| view.connected).await;
    let back = Instant::now();
    assert_eq!(ids(&view.borrow()).last(), Some(&"victim"), "kept for a lease");
    until(&mut view, S::LEASE + MARGIN, "all back", |view| {
        running(view, "one") == 5 && find(view, "late").is_some()
    })
    .await;
    let survivors = ["late", "one", "two"];
    until(&mut view, S::LEASE + MARGIN, "victim gone", |view| ids(view) == survivors).await;
    assert!(back.elapsed() > S::LEASE / 2, "gone after {:?}", back.elapsed());
    // Beyond the grace everybody is there by their own leases.
    sleep(S::BEYOND).await;
    assert_eq!(ids(&view.borrow()), survivors);
    assert!(!shrunk.is_finished(), "{}", shrunk.await.unwrap());

    one.leave().await;
    until(&mut view, S::AT_ONCE, "left", |view| ids(view) == ["late", "two"]).await;
    let again = a.join(member("one"));
    joined(&again).await;
    until(&mut view, S::AT_ONCE, "there again", |view| ids(view) == survivors).await;
}

/// Resolves with the first view that lacks one of the members that never went away.
async fn shrinks(mut view: Receiver<View>) -> String {
    let lacks = |view: &View| find(view, "one").is_none() || find(view, "two").is_none();
    let lacking = view.wait_for(lacks).await.map(|view| format!("{view:?}"));
    lacking.unwrap_or_else(|closed| closed.to_string())
}
