//! Text from tokens, one at a time, starting after the prompt. What comes out, put together, is the text of
//! all tokens; half a character never comes out: it waits for its other half, and only at the end, if that
//! never came, U+FFFD takes its place.

use super::Vocabulary;

pub struct Detokenizer {
    skip_special: bool,
    form: Form,
}

enum Form {
    Bytes(Utf8),
    Window(Window),
}

impl Detokenizer {
    /// `prompt`: its last tokens are context for vocabularies whose tokens depend on their neighbours.
    pub fn new(vocabulary: &Vocabulary, skip_special: bool, prompt: &[u32]) -> Self {
        let form = match vocabulary.bytes(0) {
            Some(_) => Form::Bytes(Utf8::default()),
            None => Form::Window(Window::new(prompt)),
        };
        Detokenizer { skip_special, form }
    }

    /// Appends the text that this token completes.
    pub fn push(&mut self, vocabulary: &Vocabulary, id: u32, out: &mut String) {
        if self.skip_special && vocabulary.is_special(id) {
            return;
        }
        match &mut self.form {
            Form::Bytes(utf8) => utf8.push(vocabulary.bytes(id).unwrap_or_default(), out),
            Form::Window(window) => window.push(vocabulary, id, self.skip_special, out),
        }
    }

    /// Appends what was still waiting.
    pub fn finish(&mut self, vocabulary: &Vocabulary, out: &mut String) {
        match &mut self.form {
            Form::Bytes(utf8) => utf8.finish(out),
            Form::Window(window) => window.finish(vocabulary, self.skip_special, out),
        }
    }
}

/// Bytes to characters, like `String::from_utf8_lossy` of all bytes together. Holds at most three bytes.
#[derive(Default)]
struct Utf8 {
    held: Vec<u8>,
}

impl Utf8 {
    fn push(&mut self, bytes: &[u8], out: &mut String) {
        if self.held.is_empty() {
            let rest = complete(bytes, out);
            self.held.extend_from_slice(rest);
        } else {
            self.held.extend_from_slice(bytes);
            let held = std::mem::take(&mut self.held);
            self.held.extend_from_slice(complete(&held, out));
        }
    }

    fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.held.clear();
        }
    }
}

/// Appends all whole characters, U+FFFD for what can never be one, and returns the unfinished rest.
fn complete<'a>(bytes: &'a [u8], out: &mut String) -> &'a [u8] {
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        out.push_str(chunk.valid());
        let invalid = chunk.invalid();
        let last = chunks.peek().is_none();
        if last && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
            return invalid;
        }
        if !invalid.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
    &[]
}

/// Decodes a short window twice, without and with the new token, and gives out the difference
/// (the method of text-generation-inference and vLLM).
struct Window {
    ids: Vec<u32>,
    /// Tokens at the front whose text is out already.
    done: usize,
}

/// Tokens of the prompt kept as context.
const CONTEXT: usize = 6;
/// Tokens after which an unfinished character is given up: no character has more.
const PATIENCE: usize = 8;

impl Window {
    fn new(prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        Window { done: ids.len(), ids }
    }

    fn push(&mut self, vocabulary: &Vocabulary, id: u32, skip_special: bool, out: &mut String) {
        self.ids.push(id);
        let fresh = self.fresh(vocabulary, skip_special);
        let unfinished =
            fresh.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.done < PATIENCE;
        if !unfinished && !fresh.is_empty() {
            out.push_str(&fresh);
            self.ids.drain(..self.done);
            self.done = self.ids.len();
        }
    }

    fn finish(&mut self, vocabulary: &Vocabulary, skip_special: bool, out: &mut String) {
        out.push_str(&self.fresh(vocabulary, skip_special));
        self.done = self.ids.len();
    }

    fn fresh(&self, vocabulary: &Vocabulary, skip_special: bool) -> String {
        let before = vocabulary.decode(&self.ids[..self.done], skip_special);
        let mut after = vocabulary.decode(&self.ids, skip_special);
        let shared = before.bytes().zip(after.bytes()).take_while(|(a, b)| a == b).count();
        let cut = (0..=shared).rev().find(|at| after.is_char_boundary(*at)).unwrap_or(0);
        after.drain(..cut);
        after
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;
    use std::sync::LazyLock;
    use tokenizers::Tokenizer;

    static DEMO: LazyLock<Vocabulary> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/checkpoint/tokenizer.json");
        Vocabulary::new(Tokenizer::from_file(path).unwrap(), None).unwrap()
    });

    /// Not byte-level: spaces are marked, rare bytes are tokens of their own.
    static MARKED: LazyLock<Vocabulary> = LazyLock::new(|| marked(None));
    static MARKED_WITH_BEGIN: LazyLock<Vocabulary> = LazyLock::new(|| marked(Some(0)));

    fn marked(bos: Option<u32>) -> Vocabulary {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens":
            [{"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "byte_fallback": true, "merges": [["▁", "a"]], "vocab":
                {"<s>": 0, "▁a": 1, "b": 2, "▁": 3, "a": 8, "<0xE2>": 4, "<0x82>": 5, "<0xAC>": 6, "é": 7}}}"#;
        Vocabulary::new(Tokenizer::from_bytes(json).unwrap(), bos).unwrap()
    }

    fn pieces(vocabulary: &Vocabulary, skip: bool, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(vocabulary, skip, prompt);
        let mut pieces: Vec<String> = Vec::new();
        for id in ids {
            pieces.push(String::new());
            detokenizer.push(vocabulary, *id, pieces.last_mut().unwrap());
        }
        pieces.push(String::new());
        detokenizer.finish(vocabulary, pieces.last_mut().unwrap());
        pieces
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let euro = DEMO.encode("€", false).unwrap();
        assert!(euro.len() > 1, "the demo vocabulary splits €");
        let whole = pieces(&DEMO, true, &[], &euro);
        assert_eq!(whole[euro.len() - 1], "€");
        assert!(whole[..euro.len() - 1].iter().all(String::is_empty));
        let cut = pieces(&DEMO, true, &[], &euro[..1]);
        assert_eq!(cut, ["", "\u{FFFD}"]);
    }

    #[test]
    fn special_tokens_show_only_when_asked_for() {
        let ids = [0, 3, DEMO.encode("a", false).unwrap()[0], 1];
        assert_eq!(pieces(&DEMO, true, &[], &ids).concat(), "a");
        assert_eq!(
            pieces(&DEMO, false, &[], &ids).concat(),
            "<｜begin▁of▁sentence｜><｜User｜>a<｜end▁of▁sentence｜>"
        );
    }

    #[test]
    fn the_prompt_is_context_and_never_comes_again() {
        assert_eq!(pieces(&MARKED, true, &[0, 1], &[1, 2, 1]).concat(), " ab a");
        assert_eq!(pieces(&MARKED, true, &[0, 4, 5], &[6, 2]).concat(), "€b");
        assert_eq!(pieces(&MARKED, true, &[2], &[4, 5, 6]), ["", "", "€", ""]);
        assert_eq!(pieces(&MARKED, true, &[2], &[4, 5]).concat(), "\u{FFFD}\u{FFFD}");
    }

    #[test]
    fn a_begin_token_is_there_exactly_once() {
        let text = "<s>\u{2581}ab";
        for (text, special, ids) in
            [(text, true, vec![0, 1, 2]), (&text[3..], true, vec![0, 1, 2]), (&text[3..], false, vec![1, 2])]
        {
            assert_eq!(MARKED_WITH_BEGIN.encode(text, special).unwrap(), ids);
        }
        let begun = DEMO.encode("<｜begin▁of▁sentence｜>a", true).unwrap();
        assert_eq!(begun[..2], [0, 0], "only a vocabulary that is told its begin token can tell");
    }

    proptest! {
        #[test]
        fn bytes_cut_anywhere_are_the_whole(bytes: Vec<u8>, text: String, cuts in proptest::collection::vec(1usize..5, 0..64)) {
            let all = [text.as_bytes(), &bytes, text.as_bytes()].concat();
            let (mut utf8, mut out, mut rest) = (Utf8::default(), String::new(), &all[..]);
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                utf8.push(piece, &mut out);
                prop_assert!(utf8.held.len() < 4);
                rest = tail;
            }
            utf8.push(rest, &mut out);
            utf8.finish(&mut out);
            prop_assert_eq!(out, String::from_utf8_lossy(&all));
        }

        #[test]
        fn tokens_one_by_one_are_tokens_together(ids in proptest::collection::vec(0u32..4096, 0..80), skip: bool) {
            prop_assert_eq!(pieces(&DEMO, skip, &[], &ids).concat(), DEMO.decode(&ids, skip));
        }

        #[test]
        fn any_text_survives(text: String) {
            let ids = DEMO.encode(&text, false).unwrap();
            prop_assert_eq!(pieces(&DEMO, false, &[], &ids).concat(), text);
        }

        #[test]
        fn marked_tokens_one_by_one_are_tokens_together(words in proptest::collection::vec(prop_oneof![
            Just(vec![1u32]), Just(vec![2]), Just(vec![1, 2]), Just(vec![7]), Just(vec![4, 5, 6]), Just(vec![3, 2])], 0..20)) {
            let ids: Vec<u32> = std::iter::once(2).chain(words.concat()).collect();
            prop_assert_eq!(pieces(&MARKED, true, &[], &ids).concat(), MARKED.decode(&ids, true));
        }
    }
}
