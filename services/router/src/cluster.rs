//! The members as the router knows them: what membership says, what we have placed there since, which
//! prefixes they probably cache, and who failed a moment ago. Credits and decode slots are guards: dropping
//! one gives back what it stands for. Knows no sockets; policy decides, this remembers.

use crate::{
    lost::Lost,
    policy::{self, Candidate, Credits, Decision, Wanted},
    prefixes::Prefixes,
};
use kv::{BlockHash, hash_blocks};
use membership::View;
use proto::{Load, LostMember, Member, Role};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub credits: Credits,
    pub refusal: Duration,
    /// Block hashes remembered per member.
    pub prefix_blocks: usize,
}

pub struct Cluster {
    settings: Settings,
    state: Mutex<State>,
    /// Something changed that may let a waiting request be placed.
    changed: Notify,
}

#[derive(Default)]
struct State {
    members: BTreeMap<String, Known>,
    turns: u64,
    lost: Lost,
    /// Since when the membership's source has not answered.
    silent: Option<Instant>,
}

struct Known {
    member: Arc<Member>,
    /// In the last view. Others stay until nothing of ours runs there, in case they come back.
    present: bool,
    owed_tokens: u64,
    owed_requests: u32,
    /// Decode slots we hold, and of these the ones that decode has not confirmed.
    slots: u32,
    pending: Use,
    /// What we took and gave back since the member last reported its load.
    unreported: Use,
    prefixes: Prefixes,
    /// It failed, and has answered nobody since.
    suspected: bool,
    full_until: Option<Instant>,
    turn: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Use {
    blocks: i64,
    sequences: i64,
}

/// A placement with everything it needs in hand.
pub struct Grant {
    pub prefill: Credit,
    pub decode: Slot,
    pub uncached: u32,
}

/// Why there is no grant.
pub type Denied = Decision;

impl Cluster {
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Cluster { settings, state: Mutex::default(), changed: Notify::new() })
    }

    /// Takes over a whole view.
    pub fn update(&self, view: &View) {
        let mut state = self.lock();
        let before = state.leave();
        for member in &view.members {
            match state.members.get_mut(&member.id) {
                Some(known) => known.report(member),
                None => drop(state.members.insert(member.id.clone(), self.newcomer(member))),
            }
        }
        state.compare(before, &view.left);
        state.silent = if view.connected { None } else { state.silent.or_else(|| Some(Instant::now())) };
        state.members.retain(|_, known| known.present || known.slots > 0 || known.owed_requests > 0);
        drop(state);
        self.changed.notify_one();
    }

    fn newcomer(&self, member: &Member) -> Known {
        Known {
            member: Arc::new(member.clone()),
            present: true,
            owed_tokens: 0,
            owed_requests: 0,
            slots: 0,
            pending: Use::default(),
            unreported: Use::default(),
            prefixes: Prefixes::new(self.settings.prefix_blocks),
            suspected: false,
            full_until: None,
            turn: 0,
        }
    }

    /// Decides and, if there is a place, takes it; not on members that are `held` for others.
    pub fn place(
        self: &Arc<Self>,
        wanted: &Wanted,
        prompt: &Prompt,
        held: &HashSet<String>,
    ) -> Result<Grant, Denied> {
        let mut state = self.lock();
        let candidates = state.candidates(wanted, prompt, held);
        match policy::place(wanted, &candidates, self.settings.credits) {
            Decision::Place { prefill, decode, uncached } => {
                drop(candidates);
                Ok(self.take(&mut state, wanted, prompt, (&prefill, &decode, uncached)))
            }
            denied => Err(denied),
        }
    }

    fn take(
        self: &Arc<Self>,
        state: &mut State,
        wanted: &Wanted,
        prompt: &Prompt,
        (prefill, decode, uncached): (&str, &str, u32),
    ) -> Grant {
        state.turns += 1;
        let turn = state.turns;
        let known = state.chosen(prefill, prompt, turn);
        known.owed_tokens += u64::from(uncached);
        known.owed_requests += 1;
        let credit = Credit { cluster: self.clone(), member: known.member.clone(), tokens: uncached };
        let known = state.chosen(decode, prompt, turn);
        let blocks = match wanted.pinned {
            Some(_) => 0,
            None => i64::from((wanted.tokens + 1).div_ceil(known.member.block_tokens.max(1))),
        };
        let slot = Slot {
            cluster: self.clone(),
            member: known.member.clone(),
            size: Use { blocks, sequences: i64::from(wanted.pinned.is_none()) },
            confirmed: false,
        };
        known.slots += 1;
        known.pending.add(slot.size, 1);
        Grant { prefill: credit, decode: slot, uncached }
    }

    /// What keeps a request from being placed now.
    pub fn lack(&self, wanted: &Wanted, prompt: &Prompt) -> Option<Denied> {
        let state = self.lock();
        match policy::place(wanted, &state.candidates(wanted, prompt, &HashSet::new()), self.settings.credits)
        {
            Decision::Place { .. } => None,
            denied => Some(denied),
        }
    }

    /// The member failed: nothing new goes there until it has answered. What membership says of it proves
    /// nothing: it may reach the membership, and not be reached by us.
    pub fn suspect(&self, id: &str) {
        self.with(id, |known| known.suspected = true);
        self.changed.notify_one();
    }

    /// The member answered.
    pub fn trust(&self, id: &str) {
        let mut suspected = false;
        self.with(id, |known| suspected = std::mem::take(&mut known.suspected));
        if suspected {
            self.changed.notify_one();
        }
    }

    /// Members that failed and have not answered since.
    pub fn suspects(&self) -> Vec<Arc<Member>> {
        let state = self.lock();
        let suspects = state.members.values().filter(|known| known.present && known.suspected);
        suspects.map(|known| known.member.clone()).collect()
    }

    /// The member refused for want of capacity, whatever its last report says.
    pub fn refused(&self, id: &str) {
        let until = Instant::now() + self.settings.refusal;
        self.with(id, |known| known.full_until = Some(until));
    }

    /// A member that ended a sequence of these tokens has their blocks in its prefix cache.
    pub fn remember(&self, id: &str, tokens: &[u32]) {
        self.with(id, |known| {
            let hashes = hash_blocks(tokens, known.member.block_tokens.max(1) as usize);
            known.prefixes.record(&hashes);
        });
    }

    /// Whether a request could be placed at all; if not, why.
    pub fn readiness(&self) -> Result<(), String> {
        let (state, nothing) = (self.lock(), Prompt::new(&[]));
        policy::readiness(&state.candidates(&Wanted::default(), &nothing, &HashSet::new()))
    }

    /// How many members are in each role and state.
    pub fn census(&self) -> BTreeMap<(Role, &'static str), u32> {
        let state = self.lock();
        let mut census = BTreeMap::new();
        for known in state.members.values().filter(|known| known.present) {
            *census.entry((known.member.role(), known.condition())).or_default() += 1;
        }
        census
    }

    /// Each member that is here, and its condition.
    pub fn members(&self) -> Vec<(Member, String)> {
        let state = self.lock();
        let present = state.members.values().filter(|known| known.present);
        present.map(|known| (known.member.as_ref().clone(), known.condition().to_owned())).collect()
    }

    /// Who went without having been told to; `missing` as in [`Lost::list`].
    pub fn lost(&self, missing: impl Fn(i32) -> Option<u32>) -> Vec<LostMember> {
        self.lock().lost.list(missing)
    }

    /// For how long the view has been the last one, its source not answering.
    pub fn stale(&self) -> Option<Duration> {
        self.lock().silent.map(|since| since.elapsed())
    }

    /// Makes [`Cluster::changed`] resolve.
    pub fn wake(&self) {
        self.changed.notify_one();
    }

    /// Resolves after the next change since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Whether any credit or slot is out.
    #[cfg(test)]
    pub fn owes(&self) -> bool {
        let idle = |known: &Known| {
            let zero = known.pending == Use::default() && known.unreported == Use::default();
            zero && (known.owed_tokens, known.owed_requests, known.slots) == (0, 0, 0)
        };
        !self.lock().members.values().all(idle)
    }

    fn with(&self, id: &str, change: impl FnOnce(&mut Known)) {
        if let Some(known) = self.lock().members.get_mut(id) {
            change(known);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Nobody is here, until a view says so again. Returns who was.
    fn leave(&mut self) -> BTreeSet<String> {
        let present = self.members.iter_mut().filter(|(_, known)| known.present);
        present.map(|(id, known)| (known.present = false, id.clone()).1).collect()
    }

    /// Who came since `before`, and who was lost: went without being seen draining here, or by who names `left`.
    fn compare(&mut self, before: BTreeSet<String>, left: &VecDeque<String>) {
        let State { members, lost, .. } = self;
        for (id, known) in members.iter() {
            match (before.contains(id), known.present) {
                (true, false) if !known.member.draining && !left.contains(id) => {
                    lost.add(known.member.clone())
                }
                (false, true) => lost.replace(&known.member),
                _ => {}
            }
        }
    }

    /// The members as `wanted` sees them.
    fn candidates(&self, wanted: &Wanted, prompt: &Prompt, held: &HashSet<String>) -> Vec<Candidate<'_>> {
        let now = Instant::now();
        let candidate = |(id, known): (&String, _)| {
            let candidate = Known::candidate(known, prompt, now);
            let excluded = candidate.excluded || wanted.shuns(id, now);
            Candidate { excluded, held: held.contains(id), ..candidate }
        };
        self.members.iter().map(candidate).collect()
    }

    /// A member that policy chose from this very state.
    fn chosen(&mut self, id: &str, prompt: &Prompt, turn: u64) -> &mut Known {
        let known = self.members.get_mut(id).expect("policy chooses among the members it was given");
        known.turn = turn;
        known.prefixes.record(&prompt.hashes(known.member.block_tokens));
        known
    }
}

impl Known {
    /// A new load report includes what we have done until now.
    fn report(&mut self, member: &Member) {
        self.present = true;
        if *self.member == *member {
            return;
        }
        if self.member.load != member.load {
            self.unreported = Use::default();
            self.full_until = None;
        }
        self.member = Arc::new(member.clone());
    }

    fn candidate(&self, prompt: &Prompt, now: Instant) -> Candidate<'_> {
        let load = self.member.load.unwrap_or_default();
        let total = i64::from(load.blocks_total);
        let free = i64::from(load.blocks_free) - self.pending.blocks - self.unreported.blocks;
        let used =
            i64::from(load.running + load.reserved) + self.pending.sequences + self.unreported.sequences;
        let block_tokens = self.member.block_tokens;
        let cached = self.prefixes.matching(&prompt.hashes(block_tokens));
        Candidate {
            member: &self.member,
            excluded: self.condition() != "ready",
            held: false,
            full: self.full_until.is_some_and(|until| now < until),
            blocks_free: u32::try_from(free.clamp(0, total)).unwrap_or(0),
            sequences_used: u32::try_from(used.max(0)).unwrap_or(u32::MAX),
            owed_tokens: self.owed_tokens,
            owed_requests: self.owed_requests,
            cached_tokens: u32::try_from(cached).unwrap_or(0).saturating_mul(block_tokens),
            turn: self.turn,
        }
    }

    fn condition(&self) -> &'static str {
        let reporting = self.member.load.is_some_and(|load: Load| load.blocks_total > 0);
        match () {
            _ if !self.present => "gone",
            _ if self.member.draining => "draining",
            _ if !reporting => "starting",
            _ if self.suspected => "suspected",
            _ => "ready",
        }
    }
}

impl Use {
    fn add(&mut self, other: Use, sign: i64) {
        self.blocks += sign * other.blocks;
        self.sequences += sign * other.sequences;
    }
}

/// Uncomputed prompt tokens that a member owes us. Dropped when the first token is there.
pub struct Credit {
    cluster: Arc<Cluster>,
    pub member: Arc<Member>,
    tokens: u32,
}

impl Drop for Credit {
    fn drop(&mut self) {
        let tokens = u64::from(self.tokens);
        self.cluster.with(&self.member.id, |known| {
            known.owed_tokens = known.owed_tokens.saturating_sub(tokens);
            known.owed_requests = known.owed_requests.saturating_sub(1);
        });
        self.cluster.changed.notify_one();
    }
}

/// Room for one sequence on a decode member. Dropped when the sequence has ended there.
pub struct Slot {
    cluster: Arc<Cluster>,
    pub member: Arc<Member>,
    size: Use,
    confirmed: bool,
}

impl Slot {
    /// The member holds the blocks now: its next load report includes them.
    pub fn confirm(&mut self) {
        if std::mem::replace(&mut self.confirmed, true) {
            return;
        }
        let size = self.size;
        self.cluster.with(&self.member.id, |known| {
            known.pending.add(size, -1);
            known.unreported.add(size, 1);
        });
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.cluster.with(&self.member.id, |known| {
            let account = if self.confirmed { &mut known.unreported } else { &mut known.pending };
            account.add(self.size, -1);
            known.slots = known.slots.saturating_sub(1);
            if self.confirmed {
                known.full_until = None;
            }
        });
        self.cluster.changed.notify_one();
    }
}

/// Tokens of a request with their block hashes, computed once for each block size in the cluster.
pub struct Prompt {
    tokens: Arc<[u32]>,
    hashes: Mutex<HashMap<u32, Arc<[BlockHash]>>>,
}

impl Prompt {
    pub fn new(tokens: &[u32]) -> Self {
        Prompt { tokens: tokens.into(), hashes: Mutex::default() }
    }

    fn hashes(&self, block_tokens: u32) -> Arc<[BlockHash]> {
        let mut hashes = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let compute = || hash_blocks(&self.tokens, block_tokens.max(1) as usize).into();
        hashes.entry(block_tokens).or_insert_with(compute).clone()
    }
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
