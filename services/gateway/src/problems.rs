//! What is wrong with the cluster, in words, and what to do about it: for `/status`, `baton status` and the dashboard.

use crate::cluster::{self, Seen};
use proto::{Member, Pool, Role, StatusReply};
use serde::Serialize;

#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    pub severity: Severity,
    pub text: String,
    pub remedy: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Requests fail or wait.
    Critical,
    /// Something is less than it should be.
    Warning,
}

/// The most severe first.
pub fn problems(seen: &Seen, model: &str) -> Vec<Problem> {
    let status = &seen.status;
    let mut problems: Vec<Problem> = unusable(status, model).into_iter().collect();
    problems.extend(status.pools.iter().filter_map(|pool| below(pool, status)));
    problems.extend(stale(status));
    problems.extend(seen.silent.iter().map(|(address, problem)| silent(address, problem)));
    problems.extend(suspected(status));
    problems.extend(apart(status));
    problems.extend(versions(&status.members));
    problems.extend(queue(status));
    problems.sort_by_key(|problem| problem.severity);
    problems
}

fn critical(text: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { severity: Severity::Critical, text: text.into(), remedy: remedy.into() }
}

fn warning(text: impl Into<String>, remedy: impl Into<String>) -> Problem {
    Problem { severity: Severity::Warning, ..critical(text, remedy) }
}

fn unusable(status: &StatusReply, model: &str) -> Option<Problem> {
    let reason = cluster::usable(&placeable(status), model).err()?;
    let remedy = if status.members.is_empty() {
        "Start workers, and see that they name the registry or the etcd and prefix that the router uses. Requests wait in the queue until then."
    } else {
        "Requests wait in the queue until a worker of the missing kind joins: start one, or see in the log of the last one why it ended."
    };
    Some(critical(format!("No request can be served: {reason}."), remedy))
}

/// With the members alone on whom the router places requests: not those that start, or that it suspects.
fn placeable(status: &StatusReply) -> StatusReply {
    let mut status = status.clone();
    if status.conditions.len() == status.members.len() {
        let mut conditions = std::mem::take(&mut status.conditions).into_iter();
        status.members.retain(|_| conditions.next().is_some_and(|condition| condition == "ready"));
    }
    status
}

fn below(pool: &Pool, status: &StatusReply) -> Option<Problem> {
    let desired = pool.desired.filter(|desired| pool.ready < *desired)?;
    let role = cluster::role(pool.role());
    let lost = status.lost.iter().filter(|lost| lost.member.as_ref().map(Member::role) == Some(pool.role()));
    let remedy = match lost.flat_map(|lost| &lost.member).next() {
        Some(member) => format!(
            "{} (process {}, {}) was lost: its log says why it ended. Where workers are started again by themselves, another takes its place.",
            member.id, member.pid, member.address
        ),
        None => "See whether the others are still starting or why they ended: their logs, or `kubectl describe pod`.".into(),
    };
    let text = format!("The {role} pool has {} of {desired} workers ready.", pool.ready);
    Some(if pool.ready == 0 { critical(text, remedy) } else { warning(text, remedy) })
}

fn stale(status: &StatusReply) -> Option<Problem> {
    let source = status.source.as_ref().filter(|source| !source.connected)?;
    let seconds = source.stale_ms / 1000;
    Some(warning(
        format!(
            "The router has had no word from {} for {seconds} s; this is its last view of the members.",
            source.kind
        ),
        "Serving goes on with the last view, but new workers cannot join. Check etcd's health (`etcdctl endpoint health`) and the way from the router to it.",
    ))
}

fn silent(address: &str, problem: &str) -> Problem {
    warning(
        format!("The router at {address} does not answer: {problem}."),
        "Requests go to the other routers. Check that it runs and that the gateway reaches that address.",
    )
}

fn suspected(status: &StatusReply) -> Option<Problem> {
    let conditions = status.members.iter().zip(&status.conditions);
    let suspected = conditions.filter(|(_, condition)| *condition == "suspected").map(|(member, _)| member);
    let named = names(suspected)?;
    Some(warning(
        format!("{named} failed a request and has not answered since."),
        "It gets no new work until it answers. Check its log and the network between the router and its address.",
    ))
}

/// Prefill and decode members that nobody of the other role fits.
fn apart(status: &StatusReply) -> Option<Problem> {
    let of = |role: Role| status.members.iter().filter(move |member| member.role() == role);
    let alone = |member: &&Member| match member.role() {
        Role::Prefill => !of(Role::Decode).any(|decode| cluster::fit(member, decode)),
        Role::Decode => !of(Role::Prefill).any(|prefill| cluster::fit(prefill, member)),
        _ => false,
    };
    if of(Role::Prefill).next().is_none() || of(Role::Decode).next().is_none() {
        return None;
    }
    let named = names(status.members.iter().filter(alone))?;
    Some(warning(
        format!("{named} fits no worker of the other role: model, weights or KV layout differ."),
        "Such workers are never paired. Start all of them with the same model directory, backend, block_tokens and load format.",
    ))
}

fn versions(members: &[Member]) -> Option<Problem> {
    let mut versions: Vec<&str> = members.iter().map(|member| member.version.as_str()).collect();
    versions.sort_unstable();
    versions.dedup();
    (versions.len() > 1).then(|| {
        warning(
            format!("Workers of several versions are here: {}.", versions.join(", ")),
            "Right while an upgrade rolls out; otherwise upgrade those that were left behind.",
        )
    })
}

fn queue(status: &StatusReply) -> Option<Problem> {
    let depth: u32 = status.queue.iter().map(|class| class.depth).sum();
    let nearly = u64::from(depth) * 10 >= u64::from(status.queue_limit) * 9;
    (status.queue_limit > 0 && nearly).then(|| {
        warning(
            format!("The queue is nearly full: {depth} of {}.", status.queue_limit),
            "Further requests are refused with 503. Add workers to the pool that is short of room, or send less.",
        )
    })
}

fn names<'a>(members: impl Iterator<Item = &'a Member>) -> Option<String> {
    let ids: Vec<&str> = members.map(|member| member.id.as_str()).collect();
    (!ids.is_empty()).then(|| ids.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{LostMember, QueueDepth, Source};

    fn member(id: &str, role: Role, layout: u64) -> Member {
        Member { id: id.into(), role: role as i32, layout_fingerprint: layout, ..Member::default() }
    }

    fn told(status: StatusReply) -> Vec<(Severity, String, String)> {
        let seen = Seen { status, routers: Vec::new(), silent: Vec::new() };
        problems(&seen, "").into_iter().map(|told| (told.severity, told.text, told.remedy)).collect()
    }

    fn pair() -> StatusReply {
        let members = vec![member("p", Role::Prefill, 1), member("d", Role::Decode, 1)];
        StatusReply { conditions: vec!["ready".into(); 2], members, ..StatusReply::default() }
    }

    #[test]
    fn a_sound_cluster_has_no_problems() {
        assert_eq!(told(pair()), []);
    }

    #[test]
    fn the_missing_and_the_lost_are_named() {
        let pool = Pool { role: Role::Decode.into(), desired: Some(2), ready: 1, draining: 0 };
        let lost = LostMember { member: Some(member("d-2", Role::Decode, 1)), lost_ms: 9 };
        let status = StatusReply { pools: vec![pool], lost: vec![lost], ..pair() };
        let [(severity, text, remedy)] = &told(status)[..] else { panic!() };
        assert_eq!(*severity, Severity::Warning);
        assert!(text.contains("decode pool has 1 of 2") && remedy.contains("d-2"), "{text} {remedy}");
        let gone = StatusReply { members: vec![member("p", Role::Prefill, 1)], ..StatusReply::default() };
        assert!(told(gone)[0].1.contains("no decode worker"));
    }

    #[test]
    fn members_that_get_nothing_are_no_help_and_an_idle_queue_is_not_full() {
        let suspected = StatusReply { conditions: vec!["ready".into(), "suspected".into()], ..pair() };
        let [(severity, text, _), ..] = &told(suspected)[..] else { panic!() };
        assert!(*severity == Severity::Critical && text.contains("no decode worker"), "{text}");
        assert_eq!(told(StatusReply { queue_limit: 5, ..pair() }), []);
    }

    #[test]
    fn what_else_is_wrong_is_said() {
        let source = Source { kind: "etcd".into(), connected: false, stale_ms: 12_000 };
        let mut status = StatusReply { source: Some(source), queue_limit: 10, ..pair() };
        status.members.push(Member { version: "9".into(), ..member("odd", Role::Decode, 2) });
        status.conditions.push("suspected".into());
        status.queue.push(QueueDepth { priority: 0, depth: 9 });
        let texts: Vec<String> = told(status).into_iter().map(|(_, text, _)| text).collect();
        for expected in ["etcd for 12 s", "odd failed", "odd fits no", "several versions", "9 of 10"] {
            assert!(texts.iter().any(|text| text.contains(expected)), "{expected}: {texts:?}");
        }
    }
}
