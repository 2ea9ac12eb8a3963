//! What comes back from a step: tokens to their listeners, full blocks to the prefix index, ends.

use super::{
    Core, Kind, SequenceId, State,
    plan::{Part, Prepared},
};
use crate::{Computed, Event, ExecutorError, StepOutput, StepRecord};
use kernels::{EntryOutput, SampledToken};
use kv::StepId;
use tokio::time::Instant;

/// A step that the executor has and has not given back.
pub(super) struct InFlight {
    pub step: StepId,
    pub prepared: Prepared,
    /// When the device could begin it: when it was submitted, or when the one before it ended.
    pub began: Instant,
}

impl Core {
    /// Takes the output of the oldest step in flight.
    pub fn collect(&mut self, output: StepOutput) -> Result<StepRecord, ExecutorError> {
        let InFlight { step, prepared, began } =
            self.in_flight.pop_front().ok_or_else(|| unasked(&output))?;
        if output.step != step || output.entries.len() != prepared.parts.len() {
            return Err(ExecutorError(format!(
                "step {step} of {} entries was answered by step {} of {}",
                prepared.parts.len(),
                output.step,
                output.entries.len()
            )));
        }
        let computed = Computed { began, ended: Instant::now() };
        if let Some(next) = self.in_flight.front_mut() {
            next.began = computed.ended;
        }
        self.collected = step;
        self.longest_step.add(output.elapsed);
        for (part, entry) in prepared.parts.iter().zip(output.entries) {
            self.settle(part, entry, computed)?;
        }
        Ok(StepRecord {
            kind: prepared.kind(),
            tokens: prepared.tokens,
            decoding: prepared.decoding(),
            sequences: prepared.parts.len(),
            elapsed: output.elapsed,
        })
    }

    fn settle(&mut self, part: &Part, output: EntryOutput, computed: Computed) -> Result<(), ExecutorError> {
        let Some(sequence) = self.sequences.get_mut(&part.id).filter(|s| s.run == part.run) else {
            return Ok(());
        };
        sequence.computed = part.computed;
        sequence.began.get_or_insert(computed.began);
        sequence.unseen -= usize::from(part.sampled);
        for (position, logprobs) in output.prompt_logprobs {
            sequence.logprobs_from = position as usize + 1;
            sequence.send(Event::PromptLogprob { position, logprobs });
        }
        let prompt_done = part.computed >= sequence.tokens.len();
        let forced = sequence.forced.filter(|_| prompt_done).map(|id| SampledToken { id, logprobs: None });
        self.publish(part.id);
        match (part.sampled, output.sampled.or(forced)) {
            (true, None) => Err(ExecutorError("a token was to be sampled and none came back".to_owned())),
            (false, None) => Ok(()),
            (_, Some(token)) => {
                self.extend(part.id, token, computed.ended);
                Ok(())
            }
        }
    }

    /// One more token, which may be the last.
    fn extend(&mut self, id: SequenceId, token: SampledToken, ended: Instant) {
        let sequence = self.sequences.get_mut(&id).expect("settled");
        let position = sequence.tokens.len() as u32;
        sequence.push(token.id);
        let computed = sequence.began.take().map(|began| Computed { began, ended });
        sequence.send(Event::Token { position, token, computed });
        let finish = sequence.finish();
        if sequence.kind == Kind::Prefill {
            if let Some(finish) = finish {
                sequence.send(Event::Finished(finish));
            }
            self.stand_by(id);
        } else if let Some(finish) = finish {
            self.end(id, Event::Finished(finish));
        }
    }

    /// Prefill is done: only what is on offer stays held, until it is delivered or nobody listens.
    fn stand_by(&mut self, id: SequenceId) {
        self.leave(id);
        self.sequences.get_mut(&id).expect("settled").state = State::Offering;
    }
}

fn unasked(output: &StepOutput) -> ExecutorError {
    ExecutorError(format!("step {} came back but none was in flight", output.step))
}
