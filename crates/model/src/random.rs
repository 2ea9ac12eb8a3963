//! A model without weight files: every tensor that its config.json asks for, filled from a seed. What such a model says means
//! nothing; what it costs is what the real one costs, because its numbers spread as trained ones do.
//!
//! Standard deviations: 1/√k for a matrix `[n][k]`, so that activations keep their size; 1 for the embedding; 0.05 for the gate, so that
//! tokens take different experts. Norms are 1 and selection biases 0.

use crate::{Config, Directory, Error, GenerationDefaults, checkpoint::read_text, names};
use kernels::{Data, Dtype, Random, Tensor};
use std::{collections::HashMap, path::Path};
use twox_hash::XxHash3_64;

const GATE_STD: f32 = 0.05;

pub(crate) struct RandomWeights {
    pub seed: u64,
    fp8: bool,
    tensors: HashMap<String, names::Expected>,
}

/// Checks a config.json as [`crate::check_directory`] does, `path` being that file or its directory. Weights are made of `seed`: FP8 where
/// the configuration says so, bf16 otherwise.
pub fn random_directory(path: &Path, seed: u64) -> Result<Directory, Error> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    let config = Config::parse(&file, &read_text(&file)?)?;
    Ok(directory(file.parent().unwrap_or(Path::new(".")), config, seed))
}

/// The same of a config.json that is no file.
pub fn random_model(config: &str, seed: u64) -> Result<Directory, Error> {
    let path = Path::new("config.json");
    Ok(directory(Path::new("."), Config::parse(path, config)?, seed))
}

fn directory(path: &Path, config: Config, seed: u64) -> Directory {
    let weights = RandomWeights::new(&config, seed);
    Directory {
        path: path.to_path_buf(),
        config,
        generation: GenerationDefaults::default(),
        mtp_tensors: 0,
        unexpected_tensors: 0,
        weights: crate::directory::Weights::Random(weights),
    }
}

impl RandomWeights {
    fn new(config: &Config, seed: u64) -> RandomWeights {
        let tensors = names::expected(config).map(|tensor| (tensor.name.clone(), tensor)).collect();
        RandomWeights { seed, fp8: config.quantization.is_some(), tensors }
    }

    pub fn tensor<'a>(&self, name: &'a str) -> Option<Tensor<'a>> {
        let expected = self.tensors.get(name)?;
        let (rows, cols) = match expected.shape.as_slice() {
            [cols] => (1, *cols),
            [rows, cols] => (*rows, *cols),
            _ => return None,
        };
        let dtype = match expected.shape.len() {
            1 => Dtype::F32,
            _ if self.fp8 && expected.quantizable => Dtype::F8E4m3,
            _ => Dtype::Bf16,
        };
        Some(Tensor {
            name,
            dtype,
            rows,
            cols,
            data: self.data(name, expected.shape.len(), cols),
            scales: None,
        })
    }

    fn data(&self, name: &str, dimensions: usize, cols: usize) -> Data<'static> {
        let std = match name {
            _ if name.ends_with("e_score_correction_bias") => return Data::Constant(0.0),
            _ if dimensions == 1 => return Data::Constant(1.0),
            names::EMBEDDING => 1.0,
            _ if name.ends_with(".mlp.gate.weight") => GATE_STD,
            _ => 1.0 / (cols as f32).sqrt(),
        };
        Data::Random(Random { key: XxHash3_64::oneshot_with_seed(self.seed, name.as_bytes()), std })
    }
}
