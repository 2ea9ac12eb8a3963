//! Stop strings found in a stream of text, wherever the stream is cut.
//!
//! Text ends with the first character at which any stop string is complete, as if it had been produced
//! character by character; if several end there, the one that begins leftmost wins. Held back is only the
//! longest tail that is the beginning of some stop string: a real partial match, never a fixed width.

/// A stop string was completed.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Its index in the list given to `StopMatcher::new`.
    pub index: usize,
}

pub struct StopMatcher {
    patterns: Vec<Pattern>,
    keep_stop: bool,
    held: String,
}

/// One stop string with its Knuth-Morris-Pratt table: constant work per byte, on average.
struct Pattern {
    bytes: Vec<u8>,
    /// `fallback[i]`: length of the longest proper prefix that is a suffix of the first `i + 1` bytes.
    fallback: Vec<usize>,
    matched: usize,
}

impl StopMatcher {
    /// `keep_stop`: the stop string itself stays in the output.
    pub fn new(stops: &[String], keep_stop: bool) -> Self {
        StopMatcher {
            patterns: stops.iter().map(|stop| Pattern::new(stop)).collect(),
            keep_stop,
            held: String::new(),
        }
    }

    /// Appends to `out` what can no longer become part of a stop string. After `Found` the text is at
    /// its end and nothing may follow.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<Found> {
        if self.patterns.is_empty() {
            out.push_str(text);
            return None;
        }
        self.held.push_str(text);
        let fresh = self.held.len() - text.len();
        for (offset, byte) in text.bytes().enumerate() {
            if let Some(index) = self.advance(byte) {
                self.cut(index, fresh + offset + 1, out);
                return Some(Found { index });
            }
        }
        self.release(out);
        None
    }

    /// The stream is over: what was held back is plain text.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The pattern completed by this byte; of several the longest, which begins leftmost.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let complete = |(index, pattern): (usize, &mut Pattern)| {
            pattern.advance(byte).then_some((pattern.bytes.len(), index))
        };
        let longest = self
            .patterns
            .iter_mut()
            .enumerate()
            .filter_map(complete)
            .max_by_key(|(len, index)| (*len, usize::MAX - index));
        longest.map(|(_, index)| index)
    }

    fn cut(&mut self, index: usize, end: usize, out: &mut String) {
        let keep = if self.keep_stop { end } else { end - self.patterns[index].bytes.len() };
        out.push_str(&self.held[..keep]);
        self.held.clear();
    }

    fn release(&mut self, out: &mut String) {
        let partial = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let free = self.held.len() - partial;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
    }
}

impl Pattern {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len()];
        for i in 1..bytes.len() {
            let mut len = fallback[i - 1];
            while len > 0 && bytes[len] != bytes[i] {
                len = fallback[len - 1];
            }
            fallback[i] = len + usize::from(bytes[len] == bytes[i]);
        }
        Pattern { bytes, fallback, matched: 0 }
    }

    /// Whether the pattern is complete with this byte. After that its state is spent.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], keep: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let stops: Vec<_> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops, keep);
        let mut out = String::new();
        for piece in pieces {
            if let Some(found) = matcher.push(piece, &mut out) {
                return (out, Some(found.index));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    #[test]
    fn stops_straddle_pieces_and_are_trimmed_or_kept() {
        assert_eq!(run(&["END"], false, &["an E", "N", "D of"]), ("an ".into(), Some(0)));
        assert_eq!(run(&["END"], true, &["an E", "N", "D of"]), ("an END".into(), Some(0)));
        assert_eq!(run(&["END"], false, &["an E", "N", "d"]), ("an ENd".into(), None));
        assert_eq!(run(&["é", "…x"], false, &["caf…é"]), ("caf…".into(), Some(0)));
    }

    #[test]
    fn the_first_to_complete_wins_and_among_those_the_leftmost() {
        assert_eq!(run(&["world", "hello"], false, &["hello world"]), ("".into(), Some(1)));
        assert_eq!(run(&["cd", "bcd"], false, &["abcd"]), ("a".into(), Some(1)));
        assert_eq!(run(&["abcde", "bcd"], false, &["abcde"]), ("a".into(), Some(1)));
        assert_eq!(run(&["aab"], false, &["aa", "ab"]), ("a".into(), Some(0)));
    }

    #[test]
    fn only_a_real_partial_match_is_held_back() {
        let mut matcher = StopMatcher::new(&["a very long stop".into()], false);
        let mut out = String::new();
        matcher.push("nothing like it", &mut out);
        assert_eq!(out, "nothing like it");
        matcher.push(" a v", &mut out);
        assert_eq!(out, "nothing like it ");
        matcher.push("a", &mut out);
        assert_eq!(out, "nothing like it a v");
    }

    /// Character by character with `ends_with`: the definition, slowly.
    fn reference(stops: &[String], keep: bool, text: &str) -> (String, Option<usize>) {
        let mut seen = String::new();
        for c in text.chars() {
            seen.push(c);
            let hits = stops.iter().enumerate().filter(|(_, stop)| seen.ends_with(stop.as_str()));
            if let Some((index, stop)) = hits.max_by_key(|(index, stop)| (stop.len(), usize::MAX - index)) {
                if !keep {
                    seen.truncate(seen.len() - stop.len());
                }
                return (seen, Some(index));
            }
        }
        (seen, None)
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_same(
            stops in proptest::collection::vec("[abé]{1,4}", 0..4),
            text in "[abéc]{0,40}",
            cuts in proptest::collection::vec(1usize..5, 0..40),
            keep: bool,
        ) {
            let chars: Vec<char> = text.chars().collect();
            let mut rest = &chars[..];
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.iter().collect::<String>());
                rest = tail;
            }
            pieces.push(rest.iter().collect());
            let stops_ref: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces_ref: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops_ref, keep, &pieces_ref), reference(&stops, keep, &text));
        }
    }
}
