//! Members that went without having been told to leave: remembered until another takes their place, or for a
//! while. For those who look at the cluster; placements know nothing of it.

use proto::{LostMember, Member};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::time::Instant;

#[derive(Default)]
pub struct Lost {
    /// The latest last.
    members: VecDeque<(Arc<Member>, Instant)>,
}

const REMEMBERED: usize = 64;
const REMEMBERED_FOR: Duration = Duration::from_secs(900);

impl Lost {
    pub fn add(&mut self, member: Arc<Member>) {
        if self.members.len() == REMEMBERED {
            self.members.pop_front();
        }
        self.members.push_back((member, Instant::now()));
    }

    /// `member` is here: the same one, back, or one in the place of the longest lost of its role.
    pub fn replace(&mut self, member: &Member) {
        let back = self.members.iter().position(|(lost, _)| lost.id == member.id);
        let replaced = || self.members.iter().position(|(lost, _)| lost.role == member.role);
        if let Some(index) = back.or_else(replaced) {
            self.members.remove(index);
        }
    }

    /// The latest first. `missing`: how many of a role there should be besides those that are here; `None`: unknown.
    pub fn list(&self, missing: impl Fn(i32) -> Option<u32>) -> Vec<LostMember> {
        let mut listed: Vec<LostMember> = Vec::new();
        let recent = self.members.iter().rev().filter(|(_, at)| at.elapsed() < REMEMBERED_FOR);
        for (member, at) in recent {
            let of_role = listed.iter().flat_map(|lost| &lost.member).filter(|lost| lost.role == member.role);
            if missing(member.role).is_none_or(|missing| of_role.count() < missing as usize) {
                let lost_ms = at.elapsed().as_millis() as u64;
                listed.push(LostMember { member: Some(member.as_ref().clone()), lost_ms });
            }
        }
        listed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Role;
    use tokio::time;

    fn member(id: &str, role: Role) -> Arc<Member> {
        Arc::new(Member { id: id.into(), role: role as i32, ..Member::default() })
    }

    fn ids(lost: &Lost, missing: Option<u32>) -> String {
        let listed = lost.list(|_| missing).into_iter().filter_map(|lost| lost.member);
        listed.map(|member| member.id).collect::<Vec<_>>().join(" ")
    }

    #[tokio::test(start_paused = true)]
    async fn the_lost_are_told_until_replaced_or_for_a_while() {
        let mut lost = Lost::default();
        ["a", "b", "c"].into_iter().for_each(|id| lost.add(member(id, Role::Decode)));
        lost.replace(&member("new", Role::Prefill));
        assert_eq!((ids(&lost, None), ids(&lost, Some(1))), ("c b a".into(), "c".into()));
        lost.replace(&member("b", Role::Decode));
        lost.replace(&member("new", Role::Decode));
        assert_eq!((ids(&lost, None), ids(&lost, Some(0))), ("c".into(), String::new()));
        time::advance(REMEMBERED_FOR).await;
        assert_eq!(ids(&lost, None), "");
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_are_remembered() {
        let mut lost = Lost::default();
        (0..=REMEMBERED).for_each(|n| lost.add(member(&n.to_string(), Role::Both)));
        assert_eq!(lost.list(|_| None).len(), REMEMBERED);
        assert!(!ids(&lost, None).ends_with(" 0"), "the oldest is forgotten");
    }
}
