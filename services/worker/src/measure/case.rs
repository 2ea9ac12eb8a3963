//! What is measured: a phase, how many sequences, how many tokens of each.

use super::BLOCK_TOKENS;
use std::{fmt, str::FromStr};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// One token of every sequence a step, behind a context of `tokens`.
    Decode,
    /// Whole prompts of `tokens`, all in one step.
    Prefill,
}

/// `decode:128x4096`, `decode:256x4096x500` (500 timed steps), `prefill:4x4096`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub phase: Phase,
    pub sequences: u32,
    pub tokens: u32,
    steps: Option<u32>,
}

impl Case {
    /// The same with so many timed steps, unless it names its own.
    pub fn or_steps(self, steps: Option<u32>) -> Case {
        Case { steps: self.steps.or(steps.filter(|_| self.phase == Phase::Decode)), ..self }
    }

    pub fn steps(&self) -> u32 {
        self.steps.unwrap_or(match self.phase {
            Phase::Decode => 24,
            Phase::Prefill => 4,
        })
    }

    /// Untimed steps before: the first reserves, the second records, and the timed ones want a full pipeline.
    pub fn warmup(&self) -> u32 {
        match self.phase {
            Phase::Decode => 6,
            Phase::Prefill => 2,
        }
    }

    pub fn tokens_of_step(&self) -> u32 {
        match self.phase {
            Phase::Decode => self.sequences,
            Phase::Prefill => self.sequences * self.tokens,
        }
    }

    /// Position of the first step's first token. Timed decode steps lie around `tokens`.
    pub fn start(&self) -> u32 {
        match self.phase {
            Phase::Decode => self.tokens.saturating_sub(self.warmup() + self.steps() / 2),
            Phase::Prefill => 0,
        }
    }

    /// Positions that a sequence takes in all.
    pub fn positions(&self) -> u32 {
        match self.phase {
            Phase::Decode => self.start() + self.warmup() + self.steps(),
            Phase::Prefill => self.tokens,
        }
    }

    /// KV blocks of all sequences.
    pub fn blocks(&self) -> u32 {
        self.sequences * self.positions().div_ceil(BLOCK_TOKENS)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = match self.phase {
            Phase::Decode => "decode",
            Phase::Prefill => "prefill",
        };
        write!(f, "{phase}:{}x{}", self.sequences, self.tokens)?;
        self.steps.map_or(Ok(()), |steps| write!(f, "x{steps}"))
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(text: &str) -> Result<Case, String> {
        let wrong = || format!("{text:?}, expected a case such as decode:128x4096 or prefill:4x4096");
        let (phase, sizes) = text.split_once(':').ok_or_else(wrong)?;
        let phase = match phase {
            "decode" => Phase::Decode,
            "prefill" => Phase::Prefill,
            _ => return Err(wrong()),
        };
        let sizes: Vec<u32> = sizes
            .split('x')
            .map(|n| n.parse().ok().filter(|n| *n > 0))
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let (sequences, tokens, steps) = match sizes[..] {
            [sequences, tokens] => (sequences, tokens, None),
            [sequences, tokens, steps] => (sequences, tokens, Some(steps)),
            _ => return Err(wrong()),
        };
        if sequences.checked_mul(tokens).is_none_or(|all| all > 1 << 28) {
            return Err(format!("{text}: more than 2^28 tokens"));
        }
        Ok(Case { phase, sequences, tokens, steps })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_read_as_they_are_written() {
        for text in ["decode:128x4096", "prefill:4x4096", "decode:256x4096x500"] {
            assert_eq!(text.parse::<Case>().unwrap().to_string(), text);
        }
        for text in ["decode", "decode:0x5", "encode:1x1", "decode:1", "decode:1x2x3x4", "decode:99999x99999"]
        {
            assert!(text.parse::<Case>().is_err(), "{text}");
        }
    }

    #[test]
    fn timed_decode_steps_lie_around_the_context() {
        let case: Case = "decode:2x4096x500".parse().unwrap();
        let first_timed = case.start() + case.warmup();
        assert_eq!((first_timed + first_timed + case.steps()) / 2, 4096);
        assert_eq!(case.positions(), first_timed + 500);
        assert_eq!(case.blocks(), 2 * case.positions().div_ceil(64));
        let short: Case = "decode:1x4".parse().unwrap();
        assert_eq!((short.start(), short.positions()), (0, short.warmup() + short.steps()));
    }
}
