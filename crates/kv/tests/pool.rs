//! The pool against a naive model: any sequence of legal operations gives the same answers, and every
//! invariant holds after each.

use kv::{BlockHash, BlockId, BlockPool, Counts, Holder, Match};
use proptest::{collection::vec, prelude::*};

const KINDS: [Holder; 3] = [Holder::Sequence, Holder::Reservation, Holder::Offer];

/// The states of all blocks, searched instead of indexed.
#[derive(Default)]
struct Naive {
    holders: Vec<Vec<Holder>>,
    hashes: Vec<Option<BlockHash>>,
    quarantined: Vec<bool>,
    /// Order of last use: larger is younger.
    used: Vec<u64>,
    clock: u64,
}

impl Naive {
    fn new(blocks: usize) -> Self {
        Naive {
            holders: vec![Vec::new(); blocks],
            hashes: vec![None; blocks],
            quarantined: vec![false; blocks],
            used: vec![0; blocks],
            clock: 0,
        }
    }

    fn idle(&self, block: usize) -> bool {
        self.holders[block].is_empty() && !self.quarantined[block]
    }

    fn cached(&self, block: usize) -> bool {
        self.idle(block) && self.hashes[block].is_some()
    }

    fn find(&self, hash: BlockHash) -> Option<usize> {
        self.hashes.iter().position(|&held| held == Some(hash))
    }

    fn present(&self, hashes: &[BlockHash]) -> Vec<usize> {
        hashes.iter().map_while(|&hash| self.find(hash)).collect()
    }

    fn count(&self, is: impl Fn(usize) -> bool) -> u32 {
        (0..self.holders.len()).filter(|&block| is(block)).count() as u32
    }

    fn counts(&self) -> Counts {
        Counts {
            free: self.count(|b| self.idle(b) && self.hashes[b].is_none()),
            cached: self.count(|b| self.cached(b)),
            held: self.count(|b| !self.holders[b].is_empty()),
            quarantined: self.count(|b| self.quarantined[b]),
            total: self.holders.len() as u32,
        }
    }

    /// Blocks that an allocation of `n` must evict, oldest first.
    fn victims(&self, n: usize) -> Vec<usize> {
        let mut cached: Vec<usize> = (0..self.holders.len()).filter(|&b| self.cached(b)).collect();
        cached.sort_by_key(|&b| self.used[b]);
        cached.truncate(n.saturating_sub(self.counts().free as usize));
        cached
    }

    fn release(&mut self, block: usize, holder: Holder) {
        let at = self.holders[block].iter().position(|&h| h == holder).expect("held");
        self.holders[block].swap_remove(at);
        self.clock += 1;
        self.used[block] = self.clock;
    }
}

#[derive(Clone, Debug)]
enum Op {
    Match { from: u128, len: usize, holder: usize },
    Allocate { n: usize, holder: usize },
    Share { pick: usize, holder: usize },
    Release { pick: usize },
    Publish { pick: usize, hash: u128 },
    Quarantine { pick: usize },
    Unquarantine { pick: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let pick = 0usize..64;
    prop_oneof![
        2 => (0u128..8, 1usize..6, 0..KINDS.len()).prop_map(|(from, len, holder)| Op::Match { from, len, holder }),
        3 => (0usize..6, 0..KINDS.len()).prop_map(|(n, holder)| Op::Allocate { n, holder }),
        1 => (pick.clone(), 0..KINDS.len()).prop_map(|(pick, holder)| Op::Share { pick, holder }),
        5 => pick.clone().prop_map(|pick| Op::Release { pick }),
        4 => (pick.clone(), 0u128..12).prop_map(|(pick, hash)| Op::Publish { pick, hash }),
        1 => pick.clone().prop_map(|pick| Op::Quarantine { pick }),
        1 => pick.prop_map(|pick| Op::Unquarantine { pick }),
    ]
}

/// One of the blocks that satisfy `is`, if any.
fn pick(blocks: usize, pick: usize, is: impl Fn(usize) -> bool) -> Option<usize> {
    let fitting: Vec<usize> = (0..blocks).filter(|&b| is(b)).collect();
    fitting.get(pick.checked_rem(fitting.len())?).copied()
}

fn apply(pool: &mut BlockPool, naive: &mut Naive, op: Op) {
    let blocks = naive.holders.len();
    match op {
        Op::Match { from, len, holder } => {
            let hashes: Vec<BlockHash> = (from..from + len as u128).map(BlockHash).collect();
            let expected = naive.present(&hashes);
            let cached = expected.iter().filter(|&&b| naive.cached(b)).count();
            assert_eq!(pool.peek(&hashes), Match { blocks: expected.len(), cached });
            let found = pool.match_prefix(&hashes, KINDS[holder]);
            assert_eq!(found.iter().map(|&b| b as usize).collect::<Vec<_>>(), expected);
            expected.iter().for_each(|&b| naive.holders[b].push(KINDS[holder]));
        }
        Op::Allocate { n, holder } => allocate(pool, naive, n, KINDS[holder]),
        Op::Share { pick: p, holder } => {
            if let Some(b) = pick(blocks, p, |b| !naive.holders[b].is_empty()) {
                pool.share(b as BlockId, KINDS[holder]);
                naive.holders[b].push(KINDS[holder]);
            }
        }
        Op::Release { pick: p } => {
            if let Some(b) = pick(blocks, p, |b| !naive.holders[b].is_empty()) {
                let holder = naive.holders[b][p % naive.holders[b].len()];
                pool.release(b as BlockId, holder);
                naive.release(b, holder);
            }
        }
        Op::Publish { pick: p, hash } => {
            if let Some(b) = pick(blocks, p, |b| !naive.holders[b].is_empty() && naive.hashes[b].is_none()) {
                let fresh = naive.find(BlockHash(hash)).is_none();
                assert_eq!(pool.publish(b as BlockId, BlockHash(hash)), fresh);
                naive.hashes[b] = fresh.then_some(BlockHash(hash));
            }
        }
        Op::Quarantine { pick: p } => {
            if let Some(b) = pick(blocks, p, |b| naive.holders[b].len() == 1 && naive.hashes[b].is_none()) {
                pool.quarantine(b as BlockId, naive.holders[b][0]);
                naive.holders[b].clear();
                naive.quarantined[b] = true;
            }
        }
        Op::Unquarantine { pick: p } => {
            if let Some(b) = pick(blocks, p, |b| naive.quarantined[b]) {
                pool.unquarantine(b as BlockId);
                naive.quarantined[b] = false;
            }
        }
    }
}

fn allocate(pool: &mut BlockPool, naive: &mut Naive, n: usize, holder: Holder) {
    let counts = naive.counts();
    let victims = naive.victims(n);
    let Some(taken) = pool.allocate(n, holder) else {
        assert!(n > (counts.free + counts.cached) as usize, "refused though {counts:?} has {n}");
        return;
    };
    assert_eq!(taken.len(), n);
    let evicted: Vec<usize> =
        taken.iter().map(|&b| b as usize).filter(|&b| naive.hashes[b].is_some()).collect();
    assert_eq!(evicted, victims, "free blocks first, then the least recently used");
    for b in taken.into_iter().map(|b| b as usize) {
        assert!(naive.idle(b));
        naive.hashes[b] = None;
        naive.holders[b].push(holder);
    }
}

proptest! {
    #[test]
    fn the_pool_is_its_naive_model(blocks in 1usize..24, ops in vec(op(), 1..200)) {
        let mut pool = BlockPool::new(blocks as u32);
        let mut naive = Naive::new(blocks);
        for op in ops {
            apply(&mut pool, &mut naive, op);
            prop_assert_eq!(pool.counts(), naive.counts());
            prop_assert_eq!(pool.check(), Ok(()));
        }
    }
}
