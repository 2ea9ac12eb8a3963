//! Bookkeeping of a pool of blocks. A block is free, cached (no holder, findable by its hash), held
//! (by n holders) or quarantined, and in exactly one of these states. Broken use (a leak's twin: the
//! double release) panics; lack of blocks is an answer, not an error. Knows no bytes.

use crate::{BlockHash, BlockId, list::List};
use std::collections::HashMap;

/// On whose behalf a block is held; a block may have several holders of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A sequence that computes with it.
    Sequence,
    /// A decode worker's promise to take a hand-off.
    Reservation,
    /// A prefill worker's offer, until the receiver has accepted it.
    Offer,
}

const KINDS: usize = 3;

/// How many blocks are in each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub free: u32,
    pub cached: u32,
    pub held: u32,
    pub quarantined: u32,
    pub total: u32,
}

/// Leading blocks that a list of hashes would find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Match {
    pub blocks: usize,
    /// Of these, blocks without a holder: taking them leaves that many fewer to allocate.
    pub cached: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Block {
    holders: [u32; KINDS],
    /// Set from publication to eviction; then the index leads back here.
    hash: Option<BlockHash>,
    quarantined: bool,
}

impl Block {
    fn holders(&self) -> u32 {
        self.holders.iter().sum()
    }
}

/// All operations take constant time per block named, and allocate nothing but their results.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    /// Blocks without a holder that keep their hash; the front is evicted first.
    cached: List,
    index: HashMap<BlockHash, BlockId>,
    quarantined: u32,
}

impl BlockPool {
    pub fn new(blocks: u32) -> Self {
        BlockPool {
            blocks: vec![Block::default(); blocks as usize],
            free: (0..blocks).rev().collect(),
            cached: List::new(blocks),
            index: HashMap::with_capacity(blocks as usize),
            quarantined: 0,
        }
    }

    /// Holds the longest run of leading `hashes` that are present, and returns their blocks.
    pub fn match_prefix(&mut self, hashes: &[BlockHash], holder: Holder) -> Vec<BlockId> {
        let found: Vec<BlockId> = self.present(hashes).collect();
        for &block in &found {
            self.hold(block, holder);
        }
        found
    }

    /// What [`Self::match_prefix`] would find now; touches nothing.
    pub fn peek(&self, hashes: &[BlockHash]) -> Match {
        self.present(hashes).fold(Match::default(), |found, block| Match {
            blocks: found.blocks + 1,
            cached: found.cached + usize::from(self.cached.contains(block)),
        })
    }

    /// Holds `n` blocks of unspecified content: free ones, then the least recently used cached ones.
    /// All or nothing.
    pub fn allocate(&mut self, n: usize, holder: Holder) -> Option<Vec<BlockId>> {
        if n > self.available() {
            return None;
        }
        let taken: Vec<BlockId> = (0..n).map(|_| self.take()).collect();
        for &block in &taken {
            self.blocks[block as usize].holders[holder as usize] = 1;
        }
        Some(taken)
    }

    /// Blocks that [`Self::allocate`] could give.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// One more holder for a held block.
    pub fn share(&mut self, block: BlockId, holder: Holder) {
        assert!(self.is_held(block), "block {block} is shared but nobody holds it");
        self.hold(block, holder);
    }

    /// One holder of this kind less. The last one leaves the block cached if it is published, else free.
    pub fn release(&mut self, block: BlockId, holder: Holder) {
        let state = &mut self.blocks[block as usize];
        let count = &mut state.holders[holder as usize];
        assert!(*count > 0, "block {block} is released by a {holder:?} that does not hold it");
        *count -= 1;
        if state.holders() > 0 {
            return;
        }
        match state.hash {
            Some(_) => self.cached.push_back(block),
            None => self.free.push(block),
        }
    }

    /// Releases a sequence's blocks, tail first, so that of one sequence the tail is evicted before
    /// the head, without which it could not be found.
    pub fn release_all(&mut self, blocks: &[BlockId], holder: Holder) {
        for &block in blocks.iter().rev() {
            self.release(block, holder);
        }
    }

    /// Passes a block from one kind of holder to another.
    pub fn pass(&mut self, block: BlockId, from: Holder, to: Holder) {
        self.share(block, to);
        self.release(block, from);
    }

    /// Makes a held, full, computed block findable. False if its hash is present already: this one
    /// then stays private.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) -> bool {
        assert!(self.is_held(block), "block {block} is published but nobody holds it");
        match (self.index.get(&hash), self.blocks[block as usize].hash) {
            (Some(&present), _) => present == block,
            (None, Some(other)) => {
                panic!("block {block} is published as {hash:?} but is {other:?}")
            }
            (None, None) => {
                self.index.insert(hash, block);
                self.blocks[block as usize].hash = Some(hash);
                true
            }
        }
    }

    /// Turns a block's only holder into quarantine: somebody may still write into it. Nobody gets it
    /// until [`Self::unquarantine`].
    pub fn quarantine(&mut self, block: BlockId, holder: Holder) {
        let state = &mut self.blocks[block as usize];
        assert!(state.hash.is_none(), "block {block} is published: nobody may be writing into it");
        assert!(
            state.holders() == 1 && state.holders[holder as usize] == 1,
            "block {block} is quarantined by a {holder:?} that is not its only holder"
        );
        *state = Block { quarantined: true, ..Block::default() };
        self.quarantined += 1;
    }

    /// The last writer is gone: the block is free.
    pub fn unquarantine(&mut self, block: BlockId) {
        let state = &mut self.blocks[block as usize];
        assert!(state.quarantined, "block {block} is not quarantined");
        state.quarantined = false;
        self.quarantined -= 1;
        self.free.push(block);
    }

    /// Holders of all kinds.
    pub fn holders(&self, block: BlockId) -> u32 {
        self.blocks[block as usize].holders()
    }

    pub fn counts(&self) -> Counts {
        let (free, cached) = (self.free.len() as u32, self.cached.len() as u32);
        let total = self.blocks.len() as u32;
        Counts {
            free,
            cached,
            held: total - free - cached - self.quarantined,
            quarantined: self.quarantined,
            total,
        }
    }

    /// Verifies every invariant; names the first that is violated. Linear: for idle moments and tests.
    pub fn check(&self) -> Result<(), String> {
        self.cached.check()?;
        let mut listed = vec![false; self.blocks.len()];
        for &block in &self.free {
            if std::mem::replace(&mut listed[block as usize], true) {
                return Err(format!("block {block} is free twice"));
            }
        }
        for (block, &free) in listed.iter().enumerate() {
            self.check_block(block as BlockId, free)?;
        }
        self.check_index()
    }

    fn check_block(&self, block: BlockId, free: bool) -> Result<(), String> {
        let state = &self.blocks[block as usize];
        let states = [free, self.cached.contains(block), state.holders() > 0, state.quarantined];
        if states.iter().filter(|&&is| is).count() != 1 {
            return Err(format!(
                "block {block} must be in one state; [free, cached, held, quarantined] = {states:?}"
            ));
        }
        if state.hash.is_some() && (free || state.quarantined) {
            return Err(format!("block {block} has a hash but may be overwritten"));
        }
        if state.hash.is_none() && self.cached.contains(block) {
            return Err(format!("block {block} is cached without a hash"));
        }
        Ok(())
    }

    fn check_index(&self) -> Result<(), String> {
        for (hash, &block) in &self.index {
            if self.blocks[block as usize].hash != Some(*hash) {
                return Err(format!(
                    "the prefix index leads from {hash:?} to block {block}, which is another"
                ));
            }
        }
        let hashed = self.blocks.iter().filter(|state| state.hash.is_some()).count();
        let quarantined = self.blocks.iter().filter(|state| state.quarantined).count();
        if hashed != self.index.len() || quarantined != self.quarantined as usize {
            return Err(format!(
                "{hashed} blocks have a hash, {} are indexed; {quarantined} are quarantined, {} were counted",
                self.index.len(),
                self.quarantined
            ));
        }
        Ok(())
    }

    fn present(&self, hashes: &[BlockHash]) -> impl Iterator<Item = BlockId> {
        hashes.iter().map_while(|hash| self.index.get(hash).copied())
    }

    fn is_held(&self, block: BlockId) -> bool {
        self.holders(block) > 0
    }

    /// Adds a holder to a cached or held block.
    fn hold(&mut self, block: BlockId, holder: Holder) {
        if !self.is_held(block) {
            self.cached.remove(block);
        }
        self.blocks[block as usize].holders[holder as usize] += 1;
    }

    /// A block without holder, hash or list; the caller made sure that there is one.
    fn take(&mut self) -> BlockId {
        self.free.pop().unwrap_or_else(|| self.evict())
    }

    fn evict(&mut self) -> BlockId {
        let block = self.cached.pop_front().expect("a block is available");
        let hash = self.blocks[block as usize].hash.take().expect("a cached block has a hash");
        self.index.remove(&hash);
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(n: u128) -> Vec<BlockHash> {
        (1..=n).map(BlockHash).collect()
    }

    /// A released, published sequence of `n` blocks.
    fn cached_sequence(pool: &mut BlockPool, n: usize) -> Vec<BlockId> {
        let blocks = pool.allocate(n, Holder::Sequence).expect("fits");
        for (&block, hash) in blocks.iter().zip(hashes(n as u128)) {
            assert!(pool.publish(block, hash));
        }
        pool.release_all(&blocks, Holder::Sequence);
        blocks
    }

    #[test]
    fn the_tail_of_a_sequence_is_evicted_before_its_head() {
        let mut pool = BlockPool::new(4);
        let blocks = cached_sequence(&mut pool, 4);
        assert_eq!(pool.allocate(1, Holder::Sequence), Some(vec![blocks[3]]));
        assert_eq!(pool.match_prefix(&hashes(4), Holder::Offer), blocks[..3]);
        assert_eq!(pool.allocate(1, Holder::Sequence), None, "all or nothing");
        pool.check().unwrap();
    }

    #[test]
    fn a_duplicate_stays_private_and_becomes_free() {
        let mut pool = BlockPool::new(4);
        let first = cached_sequence(&mut pool, 1);
        let second = pool.allocate(1, Holder::Sequence).expect("fits");
        assert!(!pool.publish(second[0], BlockHash(1)));
        pool.release(second[0], Holder::Sequence);
        assert_eq!(pool.counts(), Counts { free: 3, cached: 1, held: 0, quarantined: 0, total: 4 });
        assert_eq!(pool.match_prefix(&hashes(2), Holder::Sequence), first);
    }

    #[test]
    fn peeking_tells_what_matching_costs() {
        let mut pool = BlockPool::new(4);
        cached_sequence(&mut pool, 3);
        pool.match_prefix(&hashes(1), Holder::Sequence);
        assert_eq!(pool.peek(&hashes(4)), Match { blocks: 3, cached: 2 });
    }

    #[test]
    fn quarantine_keeps_a_block_from_everybody() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate(1, Holder::Reservation).expect("fits")[0];
        pool.quarantine(block, Holder::Reservation);
        assert_eq!(pool.counts().quarantined, 1);
        assert_eq!(pool.allocate(1, Holder::Sequence), None);
        pool.unquarantine(block);
        pool.check().unwrap();
        assert_eq!(pool.available(), 1);
    }

    #[test]
    #[should_panic(expected = "does not hold it")]
    fn a_double_release_panics() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate(1, Holder::Sequence).expect("fits")[0];
        pool.share(block, Holder::Offer);
        pool.release(block, Holder::Sequence);
        pool.release(block, Holder::Sequence);
    }
}
