//! What a gateway and a worker must have in common beside the weights: the files from which text becomes token ids and back.
//! Each computes this of its own copy, and the gateway compares.

use std::{
    fs,
    hash::Hasher,
    io::{self, ErrorKind},
    path::Path,
};
use twox_hash::XxHash3_64;

/// Those that a gateway reads. A model directory need not have all of them.
const FILES: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
/// Without it there is no text to agree about.
const TOKENIZER: &str = "tokenizer.json";

/// Of a model directory in Hugging Face layout; 0 if it has no tokenizer, which says nothing.
pub fn files_fingerprint(directory: &Path) -> io::Result<u64> {
    if !directory.join(TOKENIZER).exists() {
        return Ok(0);
    }
    let mut hash = XxHash3_64::new();
    for name in FILES {
        let bytes = match fs::read(directory.join(name)) {
            Ok(bytes) => Some(bytes),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(io::Error::new(error.kind(), format!("{name}: {error}"))),
        };
        hash.write(name.as_bytes());
        hash.write(&bytes.as_ref().map_or(u64::MAX, |bytes| bytes.len() as u64).to_le_bytes());
        hash.write(&bytes.unwrap_or_default());
    }
    // 0 means that there is none.
    Ok(hash.finish().max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_counts_and_so_does_its_absence() {
        let dir = std::env::temp_dir().join(format!("baton-files-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let of = || files_fingerprint(&dir).unwrap();
        let mut seen = vec![of()];
        for name in [
            TOKENIZER,
            "config.json",
            "chat_template.jinja",
            "tokenizer_config.json",
            "generation_config.json",
        ] {
            for text in ["", "a"] {
                fs::write(dir.join(name), text).unwrap();
                assert!(!seen.contains(&of()), "{name} {text:?}");
                seen.push(of());
            }
        }
        fs::write(dir.join("model.safetensors"), "weights have a fingerprint of their own").unwrap();
        assert_eq!((seen[0], seen.last()), (0, Some(&of())));
        fs::remove_dir_all(&dir).unwrap();
    }
}
