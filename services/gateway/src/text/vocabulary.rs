//! The tokenizer: text to ids, and what each id stands for. For byte-level BPE (DeepSeek, Kimi, Llama 3, …)
//! every token's own bytes are in one table, so that decoding a token is a slice of it.

use std::collections::HashMap;
use tokenizers::{DecoderWrapper, Tokenizer};

pub struct Vocabulary {
    tokenizer: Tokenizer,
    /// `None`: the decoder is not byte-level, and a token's text depends on its neighbours.
    bytes: Option<ByteTable>,
    special: Vec<bool>,
    /// Begin-of-sequence id that every encoded text must start with, if the configuration says so.
    bos: Option<u32>,
    longest: usize,
}

/// Bytes of all tokens, one after the other.
struct ByteTable {
    bytes: Vec<u8>,
    /// `starts[id]..starts[id + 1]`
    starts: Vec<u32>,
}

impl Vocabulary {
    /// `bos`: the begin-of-sequence id, if texts are to begin with it (`add_bos_token`).
    pub fn new(mut tokenizer: Tokenizer, bos: Option<u32>) -> Result<Self, String> {
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        let tokens = tokens_by_id(&tokenizer);
        let mut special = vec![false; tokens.len()];
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            special[id as usize] = token.special;
        }
        let byte_level = matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let bytes = byte_level.then(|| ByteTable::new(&tokens));
        let longest = tokens.iter().flatten().map(|token| token.len()).max().unwrap_or(1);
        Ok(Vocabulary { tokenizer, bytes, special, bos, longest })
    }

    /// Ids of a text. With `special`, what the tokenizer puts around a text is put there, but a begin token
    /// that the text spells out already is not doubled.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(|error| error.to_string())?;
        let mut ids = encoding.get_ids().to_vec();
        if let (true, Some(bos)) = (special, self.bos) {
            match ids.iter().take_while(|id| **id == bos).count() {
                0 => ids.insert(0, bos),
                doubled => drop(ids.drain(1..doubled.min(2))),
            }
        }
        Ok(ids)
    }

    /// Number of ids, gaps included.
    pub fn len(&self) -> usize {
        self.special.len()
    }

    /// Bytes of the longest token: a text of n bytes has at least n / longest tokens.
    pub fn longest(&self) -> usize {
        self.longest
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The token's own bytes; `None` if tokens of this vocabulary have none of their own.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.as_ref().map(|table| table.get(id))
    }

    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        self.tokenizer.decode(ids, skip_special).unwrap_or_default()
    }

    /// What a token alone stands for, special or not.
    pub fn piece(&self, id: u32) -> Vec<u8> {
        match self.bytes(id) {
            Some(bytes) => bytes.to_vec(),
            None => self.decode(&[id], false).into_bytes(),
        }
    }
}

fn tokens_by_id(tokenizer: &Tokenizer) -> Vec<Option<String>> {
    let vocabulary = tokenizer.get_vocab(true);
    let len = vocabulary.values().max().map_or(0, |max| *max as usize + 1);
    let mut tokens = vec![None; len];
    for (token, id) in vocabulary {
        tokens[id as usize] = Some(token);
    }
    tokens
}

impl ByteTable {
    fn new(tokens: &[Option<String>]) -> Self {
        let byte_of = gpt2_bytes();
        let mut table = ByteTable { bytes: Vec::new(), starts: vec![0] };
        for token in tokens {
            if let Some(token) = token {
                append(&mut table.bytes, token, &byte_of);
            }
            table.starts.push(table.bytes.len() as u32);
        }
        table
    }

    fn get(&self, id: u32) -> &[u8] {
        match self.starts.get(id as usize..id as usize + 2) {
            Some(range) => &self.bytes[range[0] as usize..range[1] as usize],
            None => &[],
        }
    }
}

/// A token with a character outside the byte alphabet (`<｜User｜>`) stands for itself.
fn append(bytes: &mut Vec<u8>, token: &str, byte_of: &HashMap<char, u8>) {
    let start = bytes.len();
    for c in token.chars() {
        match byte_of.get(&c) {
            Some(byte) => bytes.push(*byte),
            None => {
                bytes.truncate(start);
                return bytes.extend_from_slice(token.as_bytes());
            }
        }
    }
}

/// GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up, in order.
fn gpt2_bytes() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100u32;
    (0..=255u8)
        .map(|byte| {
            if printable(byte) {
                return (byte as char, byte);
            }
            let c = char::from_u32(next).unwrap_or(char::REPLACEMENT_CHARACTER);
            next += 1;
            (c, byte)
        })
        .collect()
}
