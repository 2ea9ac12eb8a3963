//! The view of one observer, and the grace it grants: after an outage of the source, members that
//! are not back yet stay for one lease, because a lease that ran out while nobody could renew it
//! says nothing about its member. Every change is published as a whole view.

use crate::{LEFT, View};
use proto::Member;
use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{self, Instant},
};

pub(crate) struct Roster {
    view: watch::Sender<View>,
    /// Members in the view that the source has not named since the last reconnect, and until when.
    kept: BTreeMap<String, Instant>,
}

impl Roster {
    pub fn new(view: watch::Sender<View>) -> Self {
        let kept = BTreeMap::new();
        Self { view, kept }
    }

    /// The source does not answer: the members stay.
    pub fn disconnected(&self) {
        change_view(&self.view, |view| std::mem::replace(&mut view.connected, false));
    }

    /// The source answers (again) and names `members`; who is missing gets `grace`.
    pub fn reconnected(
        &mut self,
        members: Vec<Member>,
        left: impl IntoIterator<Item = String>,
        grace: Duration,
    ) {
        let until = Instant::now() + grace;
        for member in &self.view.borrow().members {
            self.kept.insert(member.id.clone(), until);
        }
        self.replace(members, left);
    }

    /// The source's present whole set, and who it says has left lately.
    pub fn replace(&mut self, members: Vec<Member>, left: impl IntoIterator<Item = String>) {
        let named: HashSet<String> = members.iter().map(|member| member.id.clone()).collect();
        let left: Vec<String> = left.into_iter().filter(|id| !named.contains(id)).collect();
        self.kept.retain(|id, _| !named.contains(id) && !left.contains(id));
        change_view(&self.view, |view| {
            let stays = |member: &Member| named.contains(&member.id) || self.kept.contains_key(&member.id);
            let (stay, gone): (Vec<_>, Vec<_>) =
                std::mem::take(&mut view.members).into_iter().partition(stays);
            view.members = stay;
            gone.iter().for_each(|member| note_gone(&mut view.left, member));
            left.into_iter().for_each(|id| note_left(&mut view.left, id));
            let removed = !gone.is_empty();
            let put = members.into_iter().fold(false, |changed, member| put(view, member) | changed);
            let connected = !std::mem::replace(&mut view.connected, true);
            removed | put | connected
        });
    }

    /// Some members changed or went, together.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) {
        let kept = &mut self.kept;
        let mut apply = |view: &mut View, change| match change {
            Change::Put(member) => {
                kept.remove(&member.id);
                put(view, *member)
            }
            Change::Remove(id) => {
                kept.remove(&id);
                remove(view, &id)
            }
        };
        change_view(&self.view, |view| {
            changes.into_iter().map(|change| apply(view, change)).fold(false, |any, changed| any | changed)
        });
    }

    /// Waits for the next end of grace, and drops who has not come back; for ever if there is none.
    pub async fn expire(&mut self) {
        let Some(next) = self.kept.values().min().copied() else {
            return std::future::pending().await;
        };
        time::sleep_until(next).await;
        let now = Instant::now();
        let gone: Vec<String> =
            self.kept.iter().filter(|(_, until)| **until <= now).map(|(id, _)| id.clone()).collect();
        tracing::info!(?gone, "members that did not come back after the outage");
        self.apply(gone.into_iter().map(Change::Remove));
    }
}

#[derive(Debug)]
pub(crate) enum Change {
    Put(Box<Member>),
    Remove(String),
}

/// Publishes what `change` made of the view, if it says that it changed anything.
pub(crate) fn change_view(view: &watch::Sender<View>, change: impl FnOnce(&mut View) -> bool) {
    view.send_if_modified(|view| {
        let changed = change(view);
        view.revision += u64::from(changed);
        changed
    });
}

/// Returns whether anything changed; so does [`remove`].
pub(crate) fn put(view: &mut View, member: Member) -> bool {
    match find(view, &member.id) {
        Ok(at) if view.members[at] == member => return false,
        Ok(at) => view.members[at] = member,
        Err(at) => {
            view.left.retain(|id| *id != member.id);
            view.members.insert(at, member);
        }
    }
    true
}

pub(crate) fn remove(view: &mut View, id: &str) -> bool {
    let removed = find(view, id).map(|at| view.members.remove(at));
    removed.inspect(|member| note_gone(&mut view.left, member)).is_ok()
}

/// `member` has gone, with this as its last record.
pub(crate) fn note_gone(left: &mut VecDeque<String>, member: &Member) {
    if member.draining {
        note_left(left, member.id.clone());
    }
}

fn note_left(left: &mut VecDeque<String>, id: String) {
    if left.contains(&id) {
        return;
    }
    if left.len() == LEFT {
        left.pop_front();
    }
    left.push_back(id);
}

fn find(view: &View, id: &str) -> Result<usize, usize> {
    view.members.binary_search_by(|member| member.id.as_str().cmp(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(5);

    fn member(id: &str) -> Member {
        Member { id: id.into(), ..Member::default() }
    }

    fn ids(view: &watch::Receiver<View>) -> String {
        let view = view.borrow();
        let ids: Vec<_> = view.members.iter().map(|member| member.id.as_str()).collect();
        ids.join(" ")
    }

    fn connected() -> (Roster, watch::Receiver<View>) {
        let (sender, view) = watch::channel(View::default());
        let mut roster = Roster::new(sender);
        roster.reconnected(vec![member("b"), member("a"), member("c")], [], GRACE);
        assert!(roster.kept.is_empty());
        (roster, view)
    }

    #[tokio::test(start_paused = true)]
    async fn after_an_outage_the_missing_stay_for_one_lease_only() {
        let (mut roster, view) = connected();
        roster.disconnected();
        assert_eq!((ids(&view).as_str(), view.borrow().connected), ("a b c", false));
        time::advance(GRACE * 10).await;
        roster.reconnected(vec![], [], GRACE);
        assert_eq!((ids(&view).as_str(), view.borrow().connected), ("a b c", true));
        roster.apply([Change::Put(member("b").into())]);
        roster.replace(vec![member("b"), member("d")], []);
        assert_eq!(ids(&view), "a b c d");
        let start = Instant::now();
        roster.expire().await;
        assert_eq!((ids(&view).as_str(), start.elapsed()), ("b d", GRACE));
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_seen_again_is_removed_at_once() {
        let (mut roster, view) = connected();
        roster.reconnected(vec![member("a")], [], GRACE);
        roster.apply([Change::Put(member("b").into()), Change::Remove("a".into())]);
        assert_eq!(ids(&view), "b c");
        roster.replace(vec![], []);
        assert_eq!(ids(&view), "c");
    }

    #[tokio::test(start_paused = true)]
    async fn who_left_in_good_order_is_told_from_who_was_lost() {
        let (mut roster, view) = connected();
        let leaving = |id| Member { draining: true, ..member(id) };
        roster.apply([
            Change::Put(leaving("a").into()),
            Change::Remove("a".into()),
            Change::Remove("b".into()),
        ]);
        assert_eq!(view.borrow().left, ["a"]);
        roster.disconnected();
        roster.reconnected(vec![], ["c".into(), "a".into()], GRACE);
        assert_eq!(
            (ids(&view).as_str(), view.borrow().left.clone()),
            ("", ["a", "c"].map(String::from).into())
        );
        roster.replace(vec![], (0..LEFT).map(|n| n.to_string()));
        assert_eq!((view.borrow().left.len(), view.borrow().left[0].as_str()), (LEFT, "0"));
    }

    #[tokio::test]
    async fn only_changes_are_published_and_together() {
        let (mut roster, mut view) = connected();
        view.mark_unchanged();
        roster.replace(vec![member("a"), member("b"), member("c")], []);
        roster.apply([Change::Put(member("a").into()), Change::Remove("x".into())]);
        assert!(!view.has_changed().unwrap());
        let revision = view.borrow().revision;
        roster.apply([Change::Put(member("d").into()), Change::Remove("a".into())]);
        assert_eq!((ids(&view).as_str(), view.borrow().revision), ("b c d", revision + 1));
    }
}
