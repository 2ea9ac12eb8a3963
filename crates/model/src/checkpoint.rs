//! The safetensors files of a directory: which tensors there are, where, of what type and shape. Files are mapped,
//! never read whole; what has been converted is given back to the system.

use crate::Error;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::Metadata;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// As in the format's reference implementation.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// All tensors of a checkpoint by name.
pub struct Checkpoint {
    files: Vec<ShardFile>,
    tensors: BTreeMap<String, Entry>,
    /// What lists the tensors: the index, or the one file.
    pub listing: PathBuf,
}

struct ShardFile {
    path: PathBuf,
    map: Mmap,
}

pub struct Entry {
    file: usize,
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    /// In the file.
    range: Range<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
        let index = dir.join(INDEX);
        if index.exists() {
            return Checkpoint::sharded(dir, index);
        }
        let single = dir.join(SINGLE);
        let mut checkpoint =
            Checkpoint { files: Vec::new(), tensors: BTreeMap::new(), listing: single.clone() };
        checkpoint.add_file(single)?;
        Ok(checkpoint)
    }

    /// The index says which file a tensor is in; the file's header says everything else.
    fn sharded(dir: &Path, index: PathBuf) -> Result<Checkpoint, Error> {
        let text = read_text(&index)?;
        let parsed: Index =
            serde_json::from_str(&text).map_err(|e| Error::malformed(&index, e.to_string()))?;
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: BTreeMap::new(), listing: index };
        let shards: BTreeSet<&String> = parsed.weight_map.values().collect();
        for shard in shards {
            if shard.contains(['/', '\\']) {
                return Err(Error::malformed(
                    &checkpoint.listing,
                    format!("shard {shard:?} is outside the directory"),
                ));
            }
            checkpoint.add_file(dir.join(shard))?;
        }
        for (name, shard) in &parsed.weight_map {
            checkpoint.check_index(name, dir.join(shard))?;
        }
        Ok(checkpoint)
    }

    fn check_index(&self, name: &str, path: PathBuf) -> Result<(), Error> {
        let found = match self.tensors.get(name) {
            None => "no such tensor".to_string(),
            Some(entry) if self.files[entry.file].path != path => {
                format!("it in {}", self.files[entry.file].path.display())
            }
            Some(_) => return Ok(()),
        };
        Err(Error::Tensor {
            path,
            tensor: name.to_string(),
            expected: "it here, as the index says".to_string(),
            found,
        })
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), Error> {
        let file = File::open(&path).map_err(|cause| Error::Io { path: path.clone(), cause })?;
        // SAFETY: a mapped file must not be truncated while it is mapped; a model directory in use is read-only by contract.
        let map = unsafe { Mmap::map(&file) }.map_err(|cause| Error::Io { path: path.clone(), cause })?;
        let (start, header) = read_header(&path, &map)?;
        for (name, tensor) in header.tensors() {
            let range = start + tensor.data_offsets.0..start + tensor.data_offsets.1;
            let entry =
                Entry { file: self.files.len(), dtype: tensor.dtype, shape: tensor.shape.clone(), range };
            if let Some(twin) = self.tensors.insert(name.clone(), entry) {
                let found = format!(
                    "it in {} too",
                    self.files.get(twin.file).map_or(&path, |file| &file.path).display()
                );
                return Err(Error::Tensor {
                    path,
                    tensor: name,
                    expected: "it in one file".to_string(),
                    found,
                });
            }
        }
        self.files.push(ShardFile { path, map });
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.tensors.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    pub fn path(&self, entry: &Entry) -> &Path {
        &self.files[entry.file].path
    }

    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].map[entry.range.clone()]
    }

    /// Drops the resident pages of a tensor; reading it again reads the file again.
    pub fn forget(&self, entry: &Entry) {
        let map = &self.files[entry.file].map;
        // SAFETY: dropping clean pages of a read-only file mapping cannot change what it reads as.
        let advised = unsafe {
            map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.range.start, entry.range.len())
        };
        if let Err(cause) = advised {
            tracing::debug!(%cause, "pages of a loaded tensor stay resident");
        }
    }
}

pub fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|cause| Error::Io { path: path.to_path_buf(), cause })
}

/// Header of a file, and where its data begin. The file must have exactly the length that the header gives.
fn read_header(path: &Path, bytes: &[u8]) -> Result<(usize, Metadata), Error> {
    let malformed = |what: String| Error::malformed(path, what);
    let Some(length) = bytes.first_chunk::<8>().map(|length| u64::from_le_bytes(*length)) else {
        return Err(malformed(format!("{} bytes, too short for a safetensors file", bytes.len())));
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(malformed(format!("not a safetensors file: header length {length}")));
    }
    let start = 8 + length;
    let Some(header) = bytes.get(8..start) else {
        return Err(malformed(format!(
            "truncated within its header: expected at least {start} bytes, found {}",
            bytes.len()
        )));
    };
    let header: Metadata = serde_json::from_slice(header).map_err(|e| malformed(format!("header: {e}")))?;
    let expected = start.saturating_add(header.data_len());
    match bytes.len() {
        found if found == expected => Ok((start, header)),
        found if found < expected => Err(malformed(truncated(&header, start, found, expected))),
        found => {
            Err(malformed(format!("expected {expected} bytes, found {found}: data after the last tensor")))
        }
    }
}

fn truncated(header: &Metadata, start: usize, found: usize, expected: usize) -> String {
    let first = header
        .tensors()
        .into_iter()
        .filter(|(_, tensor)| start + tensor.data_offsets.1 > found)
        .min_by_key(|(_, tensor)| tensor.data_offsets)
        .map_or(String::new(), |(name, _)| format!(", so tensor {name} is incomplete"));
    format!("truncated: expected {expected} bytes, found {found}{first}; fetch the file again")
}
