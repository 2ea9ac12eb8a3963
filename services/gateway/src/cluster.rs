//! The cluster as the gateway needs it: would a request succeed now, and how long may it be.

use proto::{Member, QueueDepth, Role, StatusReply};
use std::{collections::BTreeMap, path::Path};

/// What all routers say together.
pub struct Seen {
    /// Members as the first router that answers sees them, the membership's source before it if possible; what
    /// requests do, added up over all routers.
    pub status: StatusReply,
    /// Each router that answers, by address, and what it alone says.
    pub routers: Vec<(String, StatusReply)>,
    /// Routers that do not answer, and why.
    pub silent: Vec<(String, String)>,
}

impl Seen {
    /// `None` if no router answers.
    pub fn new(routers: Vec<(String, StatusReply)>, silent: Vec<(String, String)>) -> Option<Self> {
        let informed =
            |(_, status): &&(String, StatusReply)| status.source.as_ref().is_some_and(|s| s.connected);
        let mut status = routers.iter().find(informed).or(routers.first())?.1.clone();
        let all = || routers.iter().map(|(_, status)| status);
        let mut queue = BTreeMap::<i32, u32>::new();
        for class in all().flat_map(|status| &status.queue) {
            *queue.entry(class.priority).or_default() += class.depth;
        }
        status.queue = queue.into_iter().map(|(priority, depth)| QueueDepth { priority, depth }).collect();
        status.running = all().map(|status| status.running).sum();
        status.queue_limit = all().map(|status| status.queue_limit).sum();
        status.migrations.clear();
        status.placements.clear();
        for other in all() {
            other.migrations.iter().for_each(|(k, n)| *status.migrations.entry(k.clone()).or_default() += n);
            other.placements.iter().for_each(|(k, n)| *status.placements.entry(k.clone()).or_default() += n);
        }
        Some(Seen { status, routers, silent })
    }
}

pub fn role(role: Role) -> &'static str {
    match role {
        Role::Prefill => "prefill",
        Role::Decode => "decode",
        Role::Both => "both",
        Role::Unspecified => "unknown",
    }
}

/// The longest context that all usable members serve (0: they do not say), or why no request would succeed.
pub fn usable(status: &StatusReply, model: &str) -> Result<u32, String> {
    let serves = |member: &&Member| !member.draining && (model.is_empty() || member.model == model);
    let members: Vec<&Member> = status.members.iter().filter(serves).collect();
    if members.is_empty() {
        return Err(nobody(status, model));
    }
    let of = |role: Role| members.iter().copied().filter(move |member| member.role() == role);
    let paired = of(Role::Prefill).any(|prefill| of(Role::Decode).any(|decode| fit(prefill, decode)));
    if !paired && of(Role::Both).next().is_none() {
        return Err(unpaired(of(Role::Prefill).count(), of(Role::Decode).count()));
    }
    Ok(members.iter().map(|member| member.max_context).filter(|context| *context > 0).min().unwrap_or(0))
}

/// The first member of `model` that has read other files of it than this gateway, `own` of them; one that has no tokenizer
/// says nothing.
pub fn other_files(status: &StatusReply, model: &str, own: u64, dir: &Path) -> Option<String> {
    let serves = |member: &&Member| !member.draining && (model.is_empty() || member.model == model);
    let other = |member: &&Member| ![0, own].contains(&member.files_fingerprint);
    let member = status.members.iter().filter(serves).find(other)?;
    Some(format!(
        "worker {} has other tokenizer, template or configuration files ({:016x}) than this gateway in {} ({own:016x}); \
         give both the same model directory, or set match_files = false if the difference is meant",
        member.id,
        member.files_fingerprint,
        dir.display()
    ))
}

/// Whether KV blocks of one mean the same to the other.
pub fn fit(prefill: &Member, decode: &Member) -> bool {
    let key = |member: &Member| (member.weights_fingerprint, member.layout_fingerprint);
    key(prefill) == key(decode) && prefill.model == decode.model
}

fn nobody(status: &StatusReply, model: &str) -> String {
    match status.members.len() {
        0 => "no workers have joined".into(),
        some if model.is_empty() => format!("all {some} workers are draining"),
        some => format!("none of {some} workers serves {model:?}"),
    }
}

fn unpaired(prefill: usize, decode: usize) -> String {
    match (prefill, decode) {
        (0, _) => format!("{decode} decode workers, but no prefill worker"),
        (_, 0) => format!("{prefill} prefill workers, but no decode worker"),
        _ => "no prefill worker fits a decode worker: model, weights or KV layout differ".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(role: Role, weights: u64, max_context: u32) -> Member {
        Member {
            role: role as i32,
            weights_fingerprint: weights,
            max_context,
            model: "m".into(),
            ..Member::default()
        }
    }

    fn status(members: &[Member]) -> StatusReply {
        StatusReply { members: members.to_vec(), ..StatusReply::default() }
    }

    #[test]
    fn a_pair_or_a_both_is_usable_and_the_shortest_context_holds() {
        let pair = [member(Role::Prefill, 1, 2048), member(Role::Decode, 1, 1024)];
        assert_eq!(usable(&status(&pair), ""), Ok(1024));
        assert_eq!(usable(&status(&[member(Role::Both, 1, 0)]), "m"), Ok(0));
    }

    #[test]
    fn requests_are_added_up_over_routers_and_members_are_not() {
        let source = |connected| Some(proto::Source { connected, ..proto::Source::default() });
        let one = StatusReply { running: 2, queue_limit: 5, source: source(false), ..StatusReply::default() };
        let other = StatusReply {
            running: 3,
            members: vec![member(Role::Both, 1, 0)],
            queue: vec![QueueDepth { priority: 0, depth: 4 }],
            migrations: [("drained".to_owned(), 1)].into(),
            source: source(true),
            ..one.clone()
        };
        let routers = vec![("a".into(), one.clone()), ("b".into(), other.clone()), ("c".into(), other)];
        let seen = Seen::new(routers, Vec::new()).unwrap().status;
        assert_eq!((seen.running, seen.queue_limit, seen.members.len()), (8, 15, 1));
        assert_eq!((seen.queue[0].depth, seen.migrations["drained"]), (8, 2));
        assert!(Seen::new(Vec::new(), Vec::new()).is_none());
    }

    #[test]
    fn a_member_with_other_files_is_named() {
        let with = |files, draining| Member {
            id: format!("w{files}"),
            files_fingerprint: files,
            draining,
            ..member(Role::Both, 1, 0)
        };
        let found = |members: &[Member]| other_files(&status(members), "m", 7, Path::new("/model"));
        assert_eq!(found(&[with(7, false), with(0, false), with(8, true)]), None);
        let reason = found(&[with(7, false), with(0xab, false)]).unwrap();
        for part in ["w171", "00000000000000ab", "0000000000000007", "/model"] {
            assert!(reason.contains(part), "{part}: {reason}");
        }
        assert_eq!(found(&[Member { model: "other".into(), ..with(8, false) }]), None);
    }

    #[test]
    fn what_is_missing_is_said() {
        let reason = |members: &[Member], model| usable(&status(members), model).unwrap_err();
        assert!(reason(&[], "").contains("no workers"));
        assert!(reason(&[member(Role::Prefill, 1, 0)], "").contains("no decode"));
        assert!(reason(&[member(Role::Decode, 1, 0)], "").contains("no prefill"));
        assert!(reason(&[member(Role::Prefill, 1, 0), member(Role::Decode, 2, 0)], "").contains("differ"));
        assert!(reason(&[member(Role::Both, 1, 0)], "other").contains("other"));
        assert!(reason(&[Member { draining: true, ..member(Role::Both, 1, 0) }], "").contains("draining"));
    }
}
