//! A doubly linked list over block numbers, its links in two arrays: push, pop and remove in constant
//! time without allocation. A block is in the list at most once.

use crate::BlockId;

/// Link of a block outside the list; also the end of the chain, kept apart by [`END`].
const OUT: BlockId = BlockId::MAX;
const END: BlockId = BlockId::MAX - 1;

#[derive(Debug)]
pub(crate) struct List {
    next: Vec<BlockId>,
    previous: Vec<BlockId>,
    first: BlockId,
    last: BlockId,
    len: usize,
}

impl List {
    /// An empty list for blocks below `blocks`.
    pub fn new(blocks: u32) -> Self {
        assert!(blocks < END, "a pool has fewer than {END} blocks");
        let links = vec![OUT; blocks as usize];
        List { next: links.clone(), previous: links, first: END, last: END, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn contains(&self, block: BlockId) -> bool {
        self.next[block as usize] != OUT
    }

    pub fn push_back(&mut self, block: BlockId) {
        assert!(!self.contains(block), "block {block} is in the list already");
        self.previous[block as usize] = self.last;
        self.next[block as usize] = END;
        match self.last {
            END => self.first = block,
            last => self.next[last as usize] = block,
        }
        self.last = block;
        self.len += 1;
    }

    pub fn pop_front(&mut self) -> Option<BlockId> {
        let block = self.first;
        if block == END {
            return None;
        }
        self.remove(block);
        Some(block)
    }

    pub fn remove(&mut self, block: BlockId) {
        assert!(self.contains(block), "block {block} is not in the list");
        let (previous, next) = (self.previous[block as usize], self.next[block as usize]);
        match previous {
            END => self.first = next,
            previous => self.next[previous as usize] = next,
        }
        match next {
            END => self.last = previous,
            next => self.previous[next as usize] = previous,
        }
        self.next[block as usize] = OUT;
        self.previous[block as usize] = OUT;
        self.len -= 1;
    }

    /// Front to back.
    pub fn iter(&self) -> impl Iterator<Item = BlockId> {
        let start = (self.first != END).then_some(self.first);
        std::iter::successors(start, |&block| Some(self.next[block as usize]).filter(|&next| next != END))
            .take(self.next.len() + 1)
    }

    /// Both directions agree, and as many blocks are chained as were counted.
    pub fn check(&self) -> Result<(), String> {
        let mut previous = END;
        for block in self.iter() {
            if self.previous[block as usize] != previous {
                return Err(format!("the list's link back from block {block} is wrong"));
            }
            previous = block;
        }
        let linked = self.next.iter().filter(|&&next| next != OUT).count();
        if previous != self.last || self.iter().count() != self.len || linked != self.len {
            return Err(format!(
                "the list counts {} blocks, chains {}, links {linked}",
                self.len,
                self.iter().count()
            ));
        }
        Ok(())
    }
}
