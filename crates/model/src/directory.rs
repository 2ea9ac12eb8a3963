//! A model directory, checked as a whole: config.json, tokenizer, and every tensor's presence, type, shape and extent.
//! What passes here can be loaded; only the values of the weights are unknown.

use crate::{
    Config, Error, GenerationDefaults,
    checkpoint::{Checkpoint, Entry, read_text},
    names::{Expected, SCALE_SUFFIX, expected, is_mtp},
    random::RandomWeights,
};
use kernels::{Dtype, Scales, Tensor};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A checked directory.
pub struct Directory {
    pub path: PathBuf,
    pub config: Config,
    pub generation: GenerationDefaults,
    /// Tensors of multi-token-prediction modules, recognised and not loaded.
    pub mtp_tensors: usize,
    /// Tensors that no part of the model asks for.
    pub unexpected_tensors: usize,
    pub(crate) weights: Weights,
}

/// Where the numbers of a model are.
pub(crate) enum Weights {
    Files(Checkpoint),
    Random(RandomWeights),
}

/// Checks everything about a model directory that can be checked without reading its weights.
pub fn check_directory(dir: &Path) -> Result<Directory, Error> {
    let config_path = dir.join("config.json");
    let config = Config::parse(&config_path, &read_text(&config_path)?)?;
    let generation = read_generation(dir)?;
    check_tokenizer(dir)?;
    let (checkpoint, used) = open_weights(dir, &config)?;
    let mtp_tensors = checkpoint.iter().filter(|(name, _)| is_mtp(&config, name)).count();
    let unexpected_tensors = checkpoint.iter().count() - used - mtp_tensors;
    let weights = Weights::Files(checkpoint);
    Ok(Directory { path: dir.to_path_buf(), config, generation, mtp_tensors, unexpected_tensors, weights })
}

/// Tensors that the files hold, as they lie there.
#[derive(Debug, Default)]
pub struct Stored {
    pub parameters: u64,
    pub bytes: u64,
    /// Tensors by type.
    pub dtypes: BTreeMap<String, usize>,
}

/// The weights alone of a directory, checked as [`check_directory`] does.
pub fn check_weights(dir: &Path, config: &Config) -> Result<Stored, Error> {
    let (checkpoint, _) = open_weights(dir, config)?;
    let mut stored = Stored::default();
    for (_, entry) in checkpoint.iter() {
        stored.parameters += entry.shape.iter().map(|n| *n as u64).product::<u64>();
        stored.bytes += checkpoint.bytes(entry).len() as u64;
        *stored.dtypes.entry(format!("{:?}", entry.dtype)).or_default() += 1;
    }
    Ok(stored)
}

/// The files, with every tensor of the model in them, and how many of theirs that takes.
fn open_weights(dir: &Path, config: &Config) -> Result<(Checkpoint, usize), Error> {
    let checkpoint = Checkpoint::open(dir)?;
    let checker = Checker { config, checkpoint: &checkpoint };
    let mut used = 0;
    for tensor in expected(config) {
        used += checker.check(&tensor)?;
    }
    Ok((checkpoint, used))
}

fn read_generation(dir: &Path) -> Result<GenerationDefaults, Error> {
    let path = dir.join("generation_config.json");
    if !path.exists() {
        return Ok(GenerationDefaults::default());
    }
    GenerationDefaults::parse(&path, &read_text(&path)?)
}

/// A tokenizer.json that the gateway will be able to read, or a message that says how to get one.
fn check_tokenizer(dir: &Path) -> Result<(), Error> {
    if dir.join("tokenizer.json").exists() {
        return Ok(());
    }
    let what = if dir.join("tiktoken.model").exists() {
        "absent, but there is a tiktoken.model, as Kimi-K2 ships it. Convert it once: in Python, with transformers and \
         tiktoken installed, `AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)` gives the tiktoken encoding \
         and pattern; `transformers.integrations.tiktoken.convert_tiktoken_to_fast(encoding, DIR)` writes tokenizer.json"
    } else {
        "absent; download it from the model's repository into this directory"
    };
    Err(Error::malformed(&dir.join("tokenizer.json"), what))
}

struct Checker<'a> {
    config: &'a Config,
    checkpoint: &'a Checkpoint,
}

impl Checker<'_> {
    /// Number of checkpoint tensors that `tensor` takes: itself and perhaps its scales.
    fn check(&self, tensor: &Expected) -> Result<usize, Error> {
        let entry = self.find(&tensor.name, &tensor.shape)?;
        let quantized = match dtype(entry.dtype) {
            Some(Dtype::F8E4m3) => true,
            Some(_) => false,
            None => {
                return Err(self.wrong(&tensor.name, entry, accepted(tensor), format!("{:?}", entry.dtype)));
            }
        };
        if !quantized {
            return Ok(1);
        }
        let Some(quantization) = self.config.quantization.filter(|_| tensor.quantizable) else {
            let expected = "BF16, F16 or F32 (config.json declares no FP8 for it)".to_string();
            return Err(self.wrong(&tensor.name, entry, expected, "F8_E4M3".to_string()));
        };
        let name = format!("{}{SCALE_SUFFIX}", tensor.name);
        let shape: Vec<usize> =
            tensor.shape.iter().zip(quantization.block).map(|(n, block)| n.div_ceil(block)).collect();
        let scales = self.find(&name, &shape)?;
        if scales.dtype != safetensors::Dtype::F32 {
            return Err(self.wrong(&name, scales, "F32".to_string(), format!("{:?}", scales.dtype)));
        }
        Ok(2)
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<&Entry, Error> {
        let Some(entry) = self.checkpoint.get(name) else {
            return Err(Error::Tensor {
                path: self.checkpoint.listing.clone(),
                tensor: name.to_string(),
                expected: format!("shape {shape:?}"),
                found: "no such tensor".to_string(),
            });
        };
        if entry.shape != shape {
            return Err(self.wrong(
                name,
                entry,
                format!("shape {shape:?}"),
                format!("shape {:?}", entry.shape),
            ));
        }
        Ok(entry)
    }

    fn wrong(&self, name: &str, entry: &Entry, expected: String, found: String) -> Error {
        Error::Tensor {
            path: self.checkpoint.path(entry).to_path_buf(),
            tensor: name.to_string(),
            expected,
            found,
        }
    }
}

fn accepted(tensor: &Expected) -> String {
    let plain = "BF16, F16 or F32";
    if tensor.quantizable { format!("{plain} or F8_E4M3") } else { plain.to_string() }
}

fn dtype(dtype: safetensors::Dtype) -> Option<Dtype> {
    match dtype {
        safetensors::Dtype::F32 => Some(Dtype::F32),
        safetensors::Dtype::F16 => Some(Dtype::F16),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        safetensors::Dtype::F8_E4M3 => Some(Dtype::F8E4m3),
        _ => None,
    }
}

impl Directory {
    /// A tensor of the model. Its presence and shape have been checked.
    pub(crate) fn tensor<'a>(&'a self, name: &'a str) -> Result<Tensor<'a>, Error> {
        let tensor = match &self.weights {
            Weights::Files(checkpoint) => self.stored(checkpoint, name),
            Weights::Random(random) => random.tensor(name),
        };
        tensor.ok_or_else(|| Error::malformed(&self.path, format!("tensor {name} was not checked")))
    }

    fn stored<'a>(&'a self, checkpoint: &'a Checkpoint, name: &'a str) -> Option<Tensor<'a>> {
        let entry = checkpoint.get(name)?;
        let dtype = dtype(entry.dtype)?;
        let (rows, cols) = match entry.shape.as_slice() {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            _ => return None,
        };
        let scales = (dtype == Dtype::F8E4m3).then(|| self.scales(checkpoint, name)).flatten();
        Some(Tensor { name, dtype, rows, cols, data: checkpoint.bytes(entry).into(), scales })
    }

    fn scales<'a>(&self, checkpoint: &'a Checkpoint, name: &str) -> Option<Scales<'a>> {
        let entry = checkpoint.get(&format!("{name}{SCALE_SUFFIX}"))?;
        Some(Scales { bytes: checkpoint.bytes(entry), block: self.config.quantization?.block })
    }

    /// The file that a tensor lies in.
    pub(crate) fn file_of(&self, name: &str) -> Option<&Path> {
        match &self.weights {
            Weights::Files(checkpoint) => checkpoint.get(name).map(|entry| checkpoint.path(entry)),
            Weights::Random(_) => None,
        }
    }

    /// Lets go of the pages of a tensor that has been converted.
    pub(crate) fn forget(&self, name: &str) {
        if let Weights::Files(checkpoint) = &self.weights
            && let Some(entry) = checkpoint.get(name)
        {
            checkpoint.forget(entry);
        }
    }
}
