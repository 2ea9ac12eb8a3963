//! What the next step computes, as a pure function of who waits, who runs and what is free. Knows no
//! tokens, no block numbers, no time.

use crate::core::SequenceId;

/// The batch and what it may take. Lists are in scheduling order: priority, then arrival.
#[derive(Debug)]
pub struct View<'a> {
    pub running: &'a [Runnable],
    /// The first in line, as many as could start now and one more.
    pub waiting: &'a [Candidate],
    pub free_blocks: usize,
    pub free_slots: usize,
    /// Tokens of the step.
    pub budget: usize,
    /// Blocks that steps in flight will free for certain, whatever they sample.
    pub blocks_soon: usize,
}

/// A sequence of the batch that has something to compute.
#[derive(Clone, Copy, Debug)]
pub struct Runnable {
    pub id: SequenceId,
    pub work: Work,
    /// May lose its blocks to an older sequence.
    pub preemptible: bool,
    /// Blocks that preempting it frees.
    pub frees: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Known tokens not yet computed; their blocks are there.
    Prefill { tokens: usize },
    /// One token, for which so many blocks (0 or 1) are missing.
    Decode { wants: usize },
}

/// A sequence that waits for the batch.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub id: SequenceId,
    /// Tokens that the prefix cache does not have.
    pub tokens: usize,
    /// Blocks that starting it takes from the free ones.
    pub blocks: usize,
}

/// Preempt these, then compute so many tokens of those; waiting sequences among them start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub preempt: Vec<SequenceId>,
    pub run: Vec<(SequenceId, usize)>,
}

pub trait SchedulePolicy: Send {
    fn plan(&self, view: &View<'_>) -> Plan;
}

/// First come, first served, in chunks that fill the budget.
pub struct ChunkedPrefill;

/// Every sequence one token; out of blocks, the youngest of the lowest priority goes.
pub struct Decode;

/// Decodes first, so that prompts do not stall answers; prompts share what is left of the budget.
pub struct Combined;

impl SchedulePolicy for ChunkedPrefill {
    fn plan(&self, view: &View<'_>) -> Plan {
        let mut draft = Draft::new(view);
        draft.prefills();
        draft.plan
    }
}

impl SchedulePolicy for Decode {
    fn plan(&self, view: &View<'_>) -> Plan {
        let mut draft = Draft::new(view);
        draft.decodes();
        draft.plan
    }
}

impl SchedulePolicy for Combined {
    fn plan(&self, view: &View<'_>) -> Plan {
        let mut draft = Draft::new(view);
        draft.decodes();
        draft.prefills();
        draft.plan
    }
}

/// Blocks to leave free for `decoding` sequences when another sequence starts, lest it be preempted
/// at once: one for every eight, since each needs a new block only once in a block's length.
pub fn headroom(decoding: usize) -> usize {
    decoding.div_ceil(8)
}

/// A plan in the making, with what is left to plan with.
struct Draft<'a> {
    view: &'a View<'a>,
    plan: Plan,
    free_blocks: usize,
    free_slots: usize,
    budget: usize,
    /// Running sequences from here on are preempted, the preemptible ones.
    cut: usize,
}

impl<'a> Draft<'a> {
    fn new(view: &'a View<'a>) -> Self {
        Draft {
            view,
            plan: Plan::default(),
            free_blocks: view.free_blocks,
            free_slots: view.free_slots,
            budget: view.budget,
            cut: view.running.len(),
        }
    }

    fn decodes(&mut self) {
        for (at, runnable) in self.view.running.iter().enumerate() {
            if self.is_preempted(at) || self.budget == 0 {
                continue;
            }
            if let Work::Decode { wants } = runnable.work
                && self.make_room(at, wants)
            {
                self.free_blocks -= wants;
                self.run(runnable.id, 1);
            }
        }
    }

    /// Preempts the youngest until `wants` blocks are free for the sequence at `at`, itself at worst,
    /// but for blocks that are about to be freed it waits.
    fn make_room(&mut self, at: usize, wants: usize) -> bool {
        while self.free_blocks < wants {
            let Some(victim) = (at + 1..self.cut).rev().find(|&v| self.view.running[v].preemptible) else {
                if self.view.blocks_soon < wants {
                    self.plan.preempt.push(self.view.running[at].id);
                }
                return false;
            };
            self.cut = victim;
            self.free_blocks += self.view.running[victim].frees;
            self.plan.preempt.push(self.view.running[victim].id);
        }
        true
    }

    fn is_preempted(&self, at: usize) -> bool {
        at >= self.cut && self.view.running[at].preemptible
    }

    /// Prompts of running and waiting sequences, merged in order. Nobody overtakes a waiting sequence
    /// that does not fit, and nobody starts while others are preempted.
    fn prefills(&mut self) {
        let mut waiting = self.view.waiting.iter().peekable();
        if !self.plan.preempt.is_empty() {
            waiting.by_ref().for_each(drop);
        }
        for (at, runnable) in self.view.running.iter().enumerate() {
            while let Some(candidate) = waiting.next_if(|candidate| candidate.id < runnable.id) {
                if !self.start(candidate) {
                    waiting.by_ref().for_each(drop);
                }
            }
            if let Work::Prefill { tokens } = runnable.work
                && !self.is_preempted(at)
            {
                self.run(runnable.id, tokens);
            }
        }
        for candidate in waiting {
            if !self.start(candidate) {
                break;
            }
        }
    }

    fn start(&mut self, candidate: &Candidate) -> bool {
        let fits = self.free_slots > 0 && self.free_blocks >= candidate.blocks + self.headroom();
        if fits && self.budget > 0 {
            self.free_blocks -= candidate.blocks;
            self.free_slots -= 1;
            self.run(candidate.id, candidate.tokens);
        }
        fits
    }

    fn headroom(&self) -> usize {
        headroom(self.view.running.iter().filter(|r| matches!(r.work, Work::Decode { .. })).count())
    }

    fn run(&mut self, id: SequenceId, tokens: usize) {
        let tokens = tokens.min(self.budget);
        if tokens > 0 {
            self.budget -= tokens;
            self.plan.run.push((id, tokens));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(arrival: u64) -> SequenceId {
        SequenceId { priority: 0, arrival }
    }

    fn decoding(arrival: u64, wants: usize) -> Runnable {
        Runnable { id: id(arrival), work: Work::Decode { wants }, preemptible: true, frees: 2 }
    }

    fn prefilling(arrival: u64, tokens: usize) -> Runnable {
        Runnable { id: id(arrival), work: Work::Prefill { tokens }, preemptible: true, frees: 2 }
    }

    fn waiting(priority: i32, arrival: u64, tokens: usize, blocks: usize) -> Candidate {
        Candidate { id: SequenceId { priority, arrival }, tokens, blocks }
    }

    fn view<'a>(running: &'a [Runnable], waiting: &'a [Candidate], free_blocks: usize) -> View<'a> {
        View { running, waiting, free_blocks, free_slots: 8, budget: 10, blocks_soon: 0 }
    }

    #[test]
    fn decodes_come_first_and_prompts_share_the_rest() {
        let running = [prefilling(1, 6), decoding(2, 0), decoding(3, 1)];
        let plan = Combined.plan(&view(&running, &[waiting(0, 4, 9, 3)], 9));
        assert_eq!(plan.run, [(id(2), 1), (id(3), 1), (id(1), 6), (id(4), 2)]);
        assert!(plan.preempt.is_empty());
    }

    #[test]
    fn a_more_urgent_prompt_goes_before_running_ones() {
        let urgent = waiting(-1, 9, 4, 1);
        let plan = ChunkedPrefill.plan(&view(&[prefilling(1, 20)], &[urgent], 9));
        assert_eq!(plan.run, [(urgent.id, 4), (id(1), 6)]);
    }

    #[test]
    fn nobody_overtakes_a_prompt_that_does_not_fit() {
        let queue = [waiting(0, 1, 5, 4), waiting(0, 2, 1, 1)];
        assert_eq!(Combined.plan(&view(&[], &queue, 3)), Plan::default());
    }

    #[test]
    fn the_youngest_gives_way_to_the_oldest() {
        let running = [decoding(1, 1), decoding(2, 1), prefilling(3, 5)];
        let plan = Combined.plan(&view(&running, &[waiting(0, 4, 1, 1)], 0));
        assert_eq!(plan, Plan { preempt: vec![id(3)], run: vec![(id(1), 1), (id(2), 1)] });
    }

    #[test]
    fn the_last_one_gives_way_itself_unless_blocks_are_about_to_be_free() {
        let running = [decoding(1, 0), decoding(2, 1)];
        let mut view = view(&running, &[], 0);
        assert_eq!(Decode.plan(&view), Plan { preempt: vec![id(2)], run: vec![(id(1), 1)] });
        view.blocks_soon = 1;
        assert_eq!(Decode.plan(&view), Plan { preempt: vec![], run: vec![(id(1), 1)] });
    }

    #[test]
    fn a_start_leaves_room_for_those_who_grow() {
        let running = [decoding(1, 0)];
        assert_eq!(Combined.plan(&view(&running, &[waiting(0, 2, 5, 3)], 3)).run, [(id(1), 1)]);
        assert_eq!(Combined.plan(&view(&running, &[waiting(0, 2, 5, 3)], 4)).run.len(), 2);
    }
}
