//! Which prefixes a member probably has in its cache: a record of what was placed there, bounded, least
//! recently used first out. Advice only: the worker's own answer is the truth.

use kv::BlockHash;
use std::collections::{HashMap, VecDeque};

pub struct Prefixes {
    limit: usize,
    /// Stamp of the last use of each block.
    used: HashMap<BlockHash, u64>,
    /// Uses in order; those whose stamp is no longer the block's are void.
    order: VecDeque<(u64, BlockHash)>,
    clock: u64,
}

impl Prefixes {
    pub fn new(limit: usize) -> Self {
        Prefixes { limit, used: HashMap::new(), order: VecDeque::new(), clock: 0 }
    }

    /// Leading blocks of `hashes` that are on record.
    pub fn matching(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.used.contains_key(hash)).count()
    }

    /// Records a prefix. Its last block is the first to go: a block is of no use without those before it.
    pub fn record(&mut self, hashes: &[BlockHash]) {
        for hash in hashes[..hashes.len().min(self.limit)].iter().rev() {
            self.clock += 1;
            self.used.insert(*hash, self.clock);
            self.order.push_back((self.clock, *hash));
        }
        self.evict();
        if self.order.len() > 2 * self.limit {
            self.order.retain(|(stamp, hash)| self.used.get(hash) == Some(stamp));
        }
    }

    fn evict(&mut self) {
        while self.used.len() > self.limit {
            let Some((stamp, hash)) = self.order.pop_front() else { return };
            if self.used.get(&hash) == Some(&stamp) {
                self.used.remove(&hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv::hash_blocks;

    fn chain(first: u32, blocks: u32) -> Vec<BlockHash> {
        hash_blocks(&(0..blocks).map(|i| first + i).collect::<Vec<_>>(), 1)
    }

    #[test]
    fn the_least_recently_used_tail_goes_first() {
        let mut prefixes = Prefixes::new(10);
        let (old, new) = (chain(0, 6), chain(100, 6));
        prefixes.record(&old);
        prefixes.record(&new);
        assert_eq!(prefixes.matching(&new), 6);
        assert_eq!(prefixes.matching(&old), 4, "its front is kept");
        prefixes.record(&old);
        assert_eq!((prefixes.matching(&old), prefixes.matching(&new)), (6, 4));
    }

    #[test]
    fn memory_is_bounded_however_often_it_is_used() {
        let mut prefixes = Prefixes::new(8);
        for round in 0..1000 {
            prefixes.record(&chain(round % 5, 20));
        }
        assert!(prefixes.used.len() <= 8 && prefixes.order.len() <= 16);
    }
}
