//! Where a request goes, as a pure function of the request and a view of the cluster. Decode capacity
//! decides first, then cached prefix and load. Only members of equal model, weights, KV layout and version
//! are paired; when nothing fits the decision says why. Knows no clock and no sockets, and changes nothing.

use proto::{Member, Role};
use std::collections::BTreeSet;
use tokio::time::Instant;

/// What placing needs to know of a request.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Served model name; empty: any.
    pub model: String,
    /// Prompt, and output generated so far.
    pub tokens: u32,
    /// Prompt and the longest output: what context and pool must be able to hold.
    pub total: u32,
    /// A decode member that holds a reservation for it already: only a prefill member is wanted.
    pub pinned: Option<String>,
    /// Members that failed it: taken only when there is no other.
    pub avoid: Vec<String>,
    /// Until then not even when there is no other: what failed a moment ago would fail again.
    pub shun_until: Option<Instant>,
}

impl Wanted {
    /// Whether a member is out of the question at `now`.
    pub fn shuns(&self, member: &str, now: Instant) -> bool {
        self.is_shunning(now) && self.avoid.iter().any(|id| id == member)
    }

    pub fn is_shunning(&self, now: Instant) -> bool {
        self.shun_until.is_some_and(|until| now < until)
    }
}

/// A member as one request sees it.
#[derive(Clone, Debug)]
pub struct Candidate<'a> {
    pub member: &'a Member,
    /// Gone, draining, suspected or not yet reporting: no new placements.
    pub excluded: bool,
    /// A request that comes first waits for it.
    pub held: bool,
    /// Refused for want of capacity a moment ago.
    pub full: bool,
    pub blocks_free: u32,
    pub sequences_used: u32,
    /// Uncomputed prompt tokens, and requests without a first token, that we placed there.
    pub owed_tokens: u64,
    pub owed_requests: u32,
    /// Leading tokens of this request that are probably in its prefix cache.
    pub cached_tokens: u32,
    /// When it was last chosen; settles ties, so that equals take turns.
    pub turn: u64,
}

/// What a prefill member may owe at once.
#[derive(Clone, Copy, Debug)]
pub struct Credits {
    pub tokens: u64,
    pub requests: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Member ids; equal for a member of role both that does everything.
    Place {
        prefill: String,
        decode: String,
        uncached: u32,
    },
    Wait(Lack),
    /// This role is missing to make a couple of usable members.
    NoMembers(Role),
    Mismatch(String),
    TooLong {
        tokens: u32,
        limit: u32,
    },
    ModelNotFound,
}

/// What a waiting request waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lack {
    /// On one of these.
    DecodeRoom(Vec<String>),
    PrefillCredit(Vec<String>),
    /// Those that could take it have room, or may have it next, for a request that comes first.
    Turn,
    /// Those that could hold it are draining, do not answer or lack quarantined blocks; others are there.
    Absent,
}

/// A member of role both is preferred to a pair when it is this much less loaded, in thousandths:
/// prefill and decode disturb each other there.
const BOTH_MARGIN: u64 = 250;

pub fn place(wanted: &Wanted, members: &[Candidate], credits: Credits) -> Decision {
    let view =
        View { wanted, credits, members: members.iter().filter(|m| serves(m.member, wanted)).collect() };
    if view.members.is_empty() {
        return if members.is_empty() { Decision::NoMembers(Role::Prefill) } else { Decision::ModelNotFound };
    }
    match view.preferred() {
        Some((prefill, decode)) => Decision::Place {
            prefill: prefill.member.id.clone(),
            decode: decode.member.id.clone(),
            uncached: view.uncached(prefill),
        },
        None => view.why_not(),
    }
}

/// Whether a request could be placed on an idle cluster of these members; if not, why.
pub fn readiness(members: &[Candidate]) -> Result<(), String> {
    let wanted = Wanted::default();
    let credits = Credits { tokens: 0, requests: 0 };
    let view = View { wanted: &wanted, credits, members: members.iter().collect() };
    match view.why_not() {
        Decision::Wait(_) => Ok(()),
        Decision::Mismatch(reason) => Err(reason),
        _ if members.is_empty() => Err("no worker has joined yet".into()),
        Decision::NoMembers(role) => Err(no_members(role)),
        other => Err(format!("{other:?}")),
    }
}

pub fn no_members(role: Role) -> String {
    let role = if role == Role::Prefill { "prefill" } else { "decode" };
    format!(
        "no {role} worker can be used: none is present that answers and is not draining; start one with `baton worker --role {role}`"
    )
}

/// Why two members must not share a request's KV blocks.
pub fn mismatch(prefill: &Member, decode: &Member) -> Option<String> {
    let differs = |what: &str, a: String, b: String| {
        Some(format!(
            "{what} differs: {a} on prefill worker {}, {b} on decode worker {}",
            prefill.id, decode.id
        ))
    };
    let (p, d) = (prefill, decode);
    if p.model != d.model {
        return differs("the model", p.model.clone(), d.model.clone());
    }
    if p.weights_fingerprint != d.weights_fingerprint {
        let hex = |m: &Member| format!("{:016x}", m.weights_fingerprint);
        return differs("the weights fingerprint", hex(p), hex(d));
    }
    if p.layout_fingerprint != d.layout_fingerprint {
        let hex = |m: &Member| format!("{:016x}", m.layout_fingerprint);
        return differs("the KV layout fingerprint", hex(p), hex(d));
    }
    if p.version != d.version {
        return differs("the version", p.version.clone(), d.version.clone());
    }
    None
}

fn serves(member: &Member, wanted: &Wanted) -> bool {
    wanted.model.is_empty() || wanted.model == member.model
}

/// A prefill and a decode member that match, or one of role both, twice.
type Couple<'a> = (&'a Candidate<'a>, &'a Candidate<'a>);

struct View<'a> {
    wanted: &'a Wanted,
    credits: Credits,
    members: Vec<&'a Candidate<'a>>,
}

impl<'a> View<'a> {
    fn role(&self, role: Role) -> impl Iterator<Item = &'a Candidate<'a>> {
        self.members.iter().copied().filter(move |candidate| candidate.member.role() == role)
    }

    fn usable(&self, role: Role) -> impl Iterator<Item = &'a Candidate<'a>> {
        self.role(role).filter(|candidate| !candidate.excluded && !candidate.held)
    }

    /// A pair of dedicated members, unless one of role both is much less loaded or the only choice.
    fn preferred(&self) -> Option<Couple<'a>> {
        let pair = self.best_pair();
        if self.wanted.pinned.is_some() {
            return pair;
        }
        let Some(both) = self.best_both() else { return pair };
        let Some((prefill, decode)) = pair else { return Some((both, both)) };
        let failed = |m: &Candidate| self.avoided(m);
        let clean = (failed(prefill) || failed(decode)) && !failed(both);
        let roomier = self.pressure(both, both) + BOTH_MARGIN < self.pressure(prefill, decode);
        Some(if clean || roomier && !failed(both) { (both, both) } else { (prefill, decode) })
    }

    fn best_pair(&self) -> Option<Couple<'a>> {
        let mut decodes: Vec<_> = match self.wanted.pinned {
            Some(_) => self.pinned().collect(),
            None => self.usable(Role::Decode).filter(|m| self.has_room(m)).collect(),
        };
        decodes.sort_by_key(|m| (self.avoided(m), self.occupancy(m), m.turn));
        decodes.into_iter().find_map(|decode| Some((self.best_prefill(decode)?, decode)))
    }

    fn best_prefill(&self, decode: &Candidate) -> Option<&'a Candidate<'a>> {
        self.usable(Role::Prefill)
            .filter(|m| {
                mismatch(m.member, decode.member).is_none() && self.has_credit(m) && self.can_prefill(m)
            })
            .min_by_key(|m| (self.avoided(m), self.backlog(m), m.owed_requests, m.turn))
    }

    fn best_both(&self) -> Option<&'a Candidate<'a>> {
        self.usable(Role::Both)
            .filter(|m| self.has_room(m) && self.has_credit(m))
            .min_by_key(|m| (self.avoided(m), self.backlog(m), self.occupancy(m), m.turn))
    }

    fn avoided(&self, candidate: &Candidate) -> bool {
        self.wanted.avoid.contains(&candidate.member.id)
    }

    /// Prompt tokens to compute before this request's first token, its own included.
    fn backlog(&self, candidate: &Candidate) -> u64 {
        candidate.owed_tokens + u64::from(self.uncached(candidate))
    }

    /// At least one token is always computed, to sample the next from.
    fn uncached(&self, candidate: &Candidate) -> u32 {
        self.wanted.tokens - candidate.cached_tokens.min(self.wanted.tokens.saturating_sub(1))
    }

    fn has_credit(&self, candidate: &Candidate) -> bool {
        let tokens = self.backlog(candidate);
        let fits = candidate.owed_requests < self.credits.requests && tokens <= self.credits.tokens;
        !candidate.full && (fits || candidate.owed_requests == 0)
    }

    fn has_room(&self, candidate: &Candidate) -> bool {
        let sequences = candidate.member.max_sequences;
        let slot = sequences == 0 || candidate.sequences_used < sequences;
        !candidate.full
            && slot
            && self.can_decode(candidate)
            && candidate.blocks_free >= self.needed(candidate)
    }

    /// Blocks for the tokens so far and the next one.
    fn needed(&self, candidate: &Candidate) -> u32 {
        blocks(self.wanted.tokens + 1, candidate.member)
    }

    fn can_prefill(&self, candidate: &Candidate) -> bool {
        self.read() <= capacity(candidate.member)
    }

    /// What a prefill member must be able to hold: the tokens so far, the first token, and one more unless the
    /// first is the last, lest the member take the end of its own room for the end of the answer.
    fn read(&self) -> u32 {
        self.wanted.total.min(self.wanted.tokens.saturating_add(2))
    }

    fn can_decode(&self, candidate: &Candidate) -> bool {
        self.wanted.total <= capacity(candidate.member)
    }

    /// Share of sequences or blocks in use once this request is there, in thousandths.
    fn occupancy(&self, candidate: &Candidate) -> u64 {
        let member = candidate.member;
        let total = u64::from(blocks_total(member).max(1));
        let cached = candidate.cached_tokens / member.block_tokens.max(1);
        let needed = u64::from(self.needed(candidate).saturating_sub(cached));
        let by_blocks = (total.saturating_sub(candidate.blocks_free.into()) + needed) * 1000 / total;
        let by_sequences =
            u64::from(candidate.sequences_used) * 1000 / u64::from(member.max_sequences.max(1));
        by_blocks.max(by_sequences)
    }

    fn pressure(&self, prefill: &Candidate, decode: &Candidate) -> u64 {
        let credit = prefill.owed_tokens * 1000 / self.credits.tokens.max(1);
        credit.max(self.occupancy(decode))
    }

    /// Members that could do it together, were they idle, there and large enough.
    fn couples(&self) -> Vec<Couple<'a>> {
        let matching = |d: &'a Candidate<'a>| {
            self.role(Role::Prefill).filter(|p| mismatch(p.member, d.member).is_none()).map(move |p| (p, d))
        };
        match self.wanted.pinned {
            Some(_) => self.pinned().flat_map(matching).collect(),
            None => {
                let both = self.role(Role::Both).map(|both| (both, both));
                self.role(Role::Decode).flat_map(matching).chain(both).collect()
            }
        }
    }

    /// Whether they could hold it, had they nothing else. What decode has reserved fits there.
    fn fits(&self, (prefill, decode): &Couple) -> bool {
        self.can_prefill(prefill) && (self.wanted.pinned.is_some() || self.can_decode(decode))
    }

    /// Whether it would have the blocks if it had nothing else; those in quarantine may never come back.
    fn in_reach(&self, decode: &Candidate) -> bool {
        let quarantined = decode.member.load.map_or(0, |load| load.blocks_quarantined);
        let blocks = blocks_total(decode.member).saturating_sub(quarantined);
        self.wanted.pinned.is_some() || self.needed(decode) <= blocks
    }

    fn open(&self, (prefill, decode): &Couple) -> bool {
        !prefill.excluded && (self.wanted.pinned.is_some() || !decode.excluded)
    }

    fn why_not(&self) -> Decision {
        let couples = self.couples();
        if couples.is_empty() {
            return self.mismatch().map_or_else(|| self.no_members(), Decision::Mismatch);
        }
        let fitting: Vec<_> = couples.iter().filter(|couple| self.fits(couple)).collect();
        if fitting.is_empty() {
            return self.too_long(&couples);
        }
        let open: Vec<_> =
            fitting.into_iter().filter(|couple| self.open(couple) && self.in_reach(couple.1)).collect();
        if !open.is_empty() {
            return Decision::Wait(self.lack(&open));
        }
        // What has a reservation must not wait with it for who may never come back.
        let others = self.wanted.pinned.is_none() && couples.iter().any(|couple| self.open(couple));
        if others { Decision::Wait(Lack::Absent) } else { self.no_members() }
    }

    /// What these lack that could take it.
    fn lack(&self, open: &[&Couple<'a>]) -> Lack {
        let pinned = self.wanted.pinned.is_some();
        let free = || open.iter().filter(|(prefill, decode)| !prefill.held && (pinned || !decode.held));
        let ids = |one: fn(&Couple<'a>) -> &'a Candidate<'a>| {
            let ids: BTreeSet<_> = free().map(|couple| one(couple).member.id.clone()).collect();
            ids.into_iter().collect()
        };
        match free().next() {
            None => Lack::Turn,
            _ if pinned || free().any(|(_, decode)| self.has_room(decode)) => {
                Lack::PrefillCredit(ids(|(prefill, _)| prefill))
            }
            _ => Lack::DecodeRoom(ids(|(_, decode)| decode)),
        }
    }

    /// No couple can hold it. One that has a reservation was placed before, and may find another place.
    fn too_long(&self, couples: &[Couple]) -> Decision {
        if self.wanted.pinned.is_some() {
            return self.no_members();
        }
        let limit = |(prefill, decode): &Couple| capacity(prefill.member).min(capacity(decode.member));
        Decision::TooLong { tokens: self.wanted.total, limit: couples.iter().map(limit).max().unwrap_or(0) }
    }

    fn no_members(&self) -> Decision {
        let usable = self.role(Role::Prefill).any(|candidate| !candidate.excluded);
        let decode = usable && self.wanted.pinned.is_none();
        Decision::NoMembers(if decode { Role::Decode } else { Role::Prefill })
    }

    fn pinned(&self) -> impl Iterator<Item = &'a Candidate<'a>> {
        let id = self.wanted.pinned.as_deref();
        self.members.iter().copied().filter(move |m| Some(m.member.id.as_str()) == id)
    }

    /// The reason if there are prefill and decode members, but no two that match, excluded ones counted:
    /// a suspected member may be back in a moment, a mismatch stays.
    fn mismatch(&self) -> Option<String> {
        let mut reason = None;
        for prefill in self.role(Role::Prefill) {
            for decode in self.role(Role::Decode) {
                reason = Some(mismatch(prefill.member, decode.member)?);
            }
        }
        reason.filter(|_| self.role(Role::Both).next().is_none())
    }
}

fn blocks(tokens: u32, member: &Member) -> u32 {
    tokens.div_ceil(member.block_tokens.max(1))
}

fn blocks_total(member: &Member) -> u32 {
    member.load.as_ref().map_or(0, |load| load.blocks_total)
}

/// Tokens of one sequence that a member could hold if it had nothing else. A pool that has not been
/// reported yet does not limit: such a member is excluded until it has.
fn capacity(member: &Member) -> u32 {
    match blocks_total(member) {
        0 => member.max_context,
        total => member.max_context.min(total.saturating_mul(member.block_tokens)),
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
