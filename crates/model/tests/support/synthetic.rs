//! Small random checkpoints, made to be broken.
#![allow(dead_code)] // Each test binary uses a part.

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, path::Path};
use tempfile::TempDir;

/// Rows and columns that share a scale; none of the sizes below divides.
pub const BLOCK: usize = 24;

#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A model directory in memory.
#[derive(Clone)]
pub struct Synthetic {
    pub config: Value,
    pub tensors: BTreeMap<String, Stored>,
    random: u32,
}

impl Synthetic {
    /// Every matrix in FP8 with block scales, one MTP tensor, one that nobody asks for.
    pub fn fp8() -> Synthetic {
        let mut model = Synthetic { config: config(), tensors: BTreeMap::new(), random: 1 };
        for (name, shape) in shapes() {
            let matrix = shape.len() == 2 && name.contains("_proj");
            if matrix { model.add_fp8(&name, &shape) } else { model.add_f32(&name, &shape) }
        }
        model.add_f32("model.layers.2.enorm.weight", &[32]);
        model.add_f32("model.extra.weight", &[2, 2]);
        model
    }

    /// The same weights, every matrix multiplied out and stored as f32.
    pub fn dequantized(&self) -> Synthetic {
        let mut model = self.clone();
        model.config.as_object_mut().unwrap().remove("quantization_config");
        let quantized: Vec<String> = self
            .tensors
            .iter()
            .filter(|(_, t)| t.dtype == Dtype::F8_E4M3)
            .map(|(name, _)| name.clone())
            .collect();
        for name in quantized {
            let scales = model.tensors.remove(&format!("{name}_scale_inv")).unwrap();
            let weight = model.tensors.get_mut(&name).unwrap();
            let values = dequantize(weight, &scales);
            *weight = f32_tensor(&weight.shape, &values);
        }
        model
    }

    fn next(&mut self) -> f32 {
        self.random = self.random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.random >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    fn add_f32(&mut self, name: &str, shape: &[usize]) {
        let centre = if name.contains("norm") { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| centre + self.next()).collect();
        self.tensors.insert(name.to_string(), f32_tensor(shape, &values));
    }

    fn add_fp8(&mut self, name: &str, shape: &[usize]) {
        // Exponents 4 to 9, so no NaN.
        let bytes = (0..shape.iter().product())
            .map(|_| ((self.next().abs() * 48.0) as u8 + 0x20) | ((self.next() > 0.0) as u8) << 7);
        let bytes = bytes.collect();
        self.tensors.insert(name.to_string(), Stored { dtype: Dtype::F8_E4M3, shape: shape.to_vec(), bytes });
        let blocks: Vec<usize> = shape.iter().map(|n| n.div_ceil(BLOCK)).collect();
        let scales: Vec<f32> = (0..blocks.iter().product()).map(|_| 0.1 + 0.1 * self.next().abs()).collect();
        self.tensors.insert(format!("{name}_scale_inv"), f32_tensor(&blocks, &scales));
    }

    /// Writes everything, all tensors in one file.
    pub fn write(&self) -> TempDir {
        let dir = self.write_config();
        write_shard(&dir.path().join("model.safetensors"), self.tensors.iter());
        dir
    }

    /// Writes `shards` files and an index; neighbours by name, so a weight and its scales too, go to different files.
    pub fn write_sharded(&self, shards: usize) -> TempDir {
        let dir = self.write_config();
        let file = |shard: usize| format!("model-{:05}-of-{shards:06}.safetensors", shard + 1);
        let mut map = serde_json::Map::new();
        for shard in 0..shards {
            let own = || self.tensors.iter().skip(shard).step_by(shards);
            write_shard(&dir.path().join(file(shard)), own());
            map.extend(own().map(|(name, _)| (name.clone(), json!(file(shard)))));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": map});
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        dir
    }

    fn write_config(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        dir
    }
}

fn write_shard<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Stored)>) {
    let views = tensors.map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

pub fn f32_tensor(shape: &[usize], values: &[f32]) -> Stored {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Stored { dtype: Dtype::F32, shape: shape.to_vec(), bytes }
}

fn dequantize(weight: &Stored, scales: &Stored) -> Vec<f32> {
    let (cols, per_row) = (weight.shape[1], scales.shape[1]);
    let scale = |block: usize| f32::from_le_bytes(scales.bytes[4 * block..][..4].try_into().unwrap());
    let value = |(index, byte): (usize, &u8)| {
        let (row, col) = (index / cols, index % cols);
        e4m3(*byte) * scale(row / BLOCK * per_row + col / BLOCK)
    };
    weight.bytes.iter().enumerate().map(value).collect()
}

/// Normal numbers only.
fn e4m3(byte: u8) -> f32 {
    let magnitude = (1.0 + f32::from(byte & 7) / 8.0) * 2f32.powi(i32::from(byte >> 3 & 15) - 7);
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

fn config() -> Value {
    serde_json::from_str(include_str!("synthetic.json")).unwrap()
}

fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut all: Vec<(String, Vec<usize>)> = [
        ("model.embed_tokens.weight", vec![70, 32]),
        ("model.norm.weight", vec![32]),
        ("lm_head.weight", vec![70, 32]),
    ]
    .map(|(name, shape)| (name.to_string(), shape))
    .into();
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.");
        let mut add =
            |name: &str, shape: &[usize]| all.push((format!("{prefix}{name}.weight"), shape.to_vec()));
        add("input_layernorm", &[32]);
        add("post_attention_layernorm", &[32]);
        add("self_attn.q_a_proj", &[24, 32]);
        add("self_attn.q_a_layernorm", &[24]);
        add("self_attn.q_b_proj", &[48, 24]);
        add("self_attn.kv_a_proj_with_mqa", &[36, 32]);
        add("self_attn.kv_a_layernorm", &[28]);
        add("self_attn.kv_b_proj", &[64, 28]);
        add("self_attn.o_proj", &[32, 32]);
    }
    mlp(&mut all, "model.layers.0.mlp.", 40);
    mlp(&mut all, "model.layers.1.mlp.shared_experts.", 16);
    (0..4).for_each(|expert| mlp(&mut all, &format!("model.layers.1.mlp.experts.{expert}."), 16));
    all.push(("model.layers.1.mlp.gate.weight".to_string(), vec![4, 32]));
    all.push(("model.layers.1.mlp.gate.e_score_correction_bias".to_string(), vec![4]));
    all
}

fn mlp(all: &mut Vec<(String, Vec<usize>)>, prefix: &str, width: usize) {
    for (name, shape) in [("gate", [width, 32]), ("up", [width, 32]), ("down", [32, width])] {
        all.push((format!("{prefix}{name}_proj.weight"), shape.to_vec()));
    }
}
