//! The time below which a GPU cannot run a step: of every product and of attention the longer of its arithmetic and its traffic, one
//! after the other. Weights count once a step and only those that a token chose; nothing is counted for launches.

use super::{Case, Phase, kv_bytes};
use model::{Config, Moe};

/// What a GPU does in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Bytes, read and written together.
    pub bytes: f64,
    /// Multiplications and additions in bf16, and in FP8.
    pub bf16: f64,
    pub fp8: f64,
}

impl Rates {
    /// One H200: a large copy, and what its tensor cores reach in large products.
    pub const H200: Rates = Rates { bytes: 4.3e12, bf16: 7.9e14, fp8: 1.58e15 };
}

/// Sizes in f64, for one step of a case.
struct Step<'a> {
    config: &'a Config,
    rates: &'a Rates,
    case: &'a Case,
    /// Input tokens.
    t: f64,
    hidden: f64,
    heads: f64,
}

pub fn seconds(config: &Config, case: &Case, rates: &Rates) -> f64 {
    let (hidden, heads) = (f64::from(config.hidden), f64::from(config.heads));
    let step = Step { config, rates, case, t: f64::from(case.tokens_of_step()), hidden, heads };
    (0..config.layers).map(|layer| step.layer(layer)).sum::<f64>() + step.head()
}

impl Step<'_> {
    fn layer(&self, layer: u32) -> f64 {
        let feed_forward = match self.config.moe_of(layer) {
            None => self.mlp(f64::from(self.config.dense_width)),
            Some(moe) => self.sparse(moe),
        };
        self.attention() + feed_forward
    }

    fn attention(&self) -> f64 {
        let Config { nope, rope_dim, value, kv_lora_rank, q_lora_rank, .. } = *self.config;
        let [nope, rope, value, latent] = [nope, rope_dim, value, kv_lora_rank].map(f64::from);
        let query = self.heads * (nope + rope);
        let low = latent + rope;
        let project = match q_lora_rank.map(f64::from) {
            None => self.product(query, self.hidden) + self.product(low, self.hidden),
            Some(rank) => self.product(rank + low, self.hidden) + self.product(query, rank),
        };
        // Residual and norm twice, read and written, and the inner norms.
        let norms =
            self.bytes(self.t * (16.0 * self.hidden + 4.0 * (latent + f64::from(q_lora_rank.unwrap_or(0)))));
        let output = self.product(self.hidden, self.heads * value);
        project + norms + output + self.core(nope, rope, value, latent)
    }

    fn core(&self, nope: f64, rope: f64, value: f64, latent: f64) -> f64 {
        let tokens = f64::from(self.case.tokens);
        match self.case.phase {
            Phase::Decode => {
                let width = 2.0 * latent + rope;
                let rows = f64::from(kv_bytes(self.config) as u32 / self.config.layers);
                let bytes = self.t * (tokens * rows + 2.0 * self.heads * width);
                let attend = self.longer(2.0 * self.t * self.heads * tokens * width, self.rates.bf16, bytes);
                attend + self.absorb(nope, latent) + self.absorb(value, latent)
            }
            Phase::Prefill => {
                // Half of the square: causal.
                let operations = self.t * tokens * self.heads * (nope + rope + value);
                operations / self.rates.bf16 + self.product(self.heads * (nope + value), latent)
            }
        }
    }

    /// Into the latent space, or out of it: a matrix for each head.
    fn absorb(&self, of: f64, latent: f64) -> f64 {
        let bytes = 2.0 * self.heads * (of * latent + self.t * (of + latent));
        self.longer(2.0 * self.t * self.heads * of * latent, self.rates.bf16, bytes)
    }

    fn sparse(&self, moe: &Moe) -> f64 {
        let [experts, width, top_k] = [moe.experts, moe.width, moe.rule.top_k].map(f64::from);
        let gate = 2.0 * experts * self.hidden + self.t * (2.0 * self.hidden + 4.0 * experts);
        let gate = self.longer(2.0 * self.t * experts * self.hidden, self.rates.bf16, gate);
        // Experts that at least one token chose, choices being even.
        let touched = experts * (1.0 - (1.0 - top_k / experts).powf(self.t));
        let slots = self.t * top_k;
        let matrices = 3.0 * self.hidden * width;
        let rows = self.quantized(self.hidden) + 8.0 * width + self.quantized(width) + 2.0 * self.hidden;
        let bytes = touched * matrices * self.element() + slots * rows;
        let routed = self.longer(2.0 * slots * matrices, self.rate(), bytes);
        let combine = self.bytes((top_k + 2.0) * 2.0 * self.hidden * self.t);
        let shared = if moe.shared_width > 0 { self.mlp(f64::from(moe.shared_width)) } else { 0.0 };
        gate + routed + combine + shared
    }

    fn mlp(&self, width: f64) -> f64 {
        let matrices = 3.0 * self.hidden * width;
        let rows = self.quantized(self.hidden) + 8.0 * width + self.quantized(width) + 2.0 * self.hidden;
        self.longer(2.0 * self.t * matrices, self.rate(), matrices * self.element() + self.t * rows)
    }

    /// `[n][k]` over all tokens, its input quantised already.
    fn product(&self, n: f64, k: f64) -> f64 {
        let bytes = n * k * self.element() + self.t * (self.quantized(k) + 2.0 * n);
        self.longer(2.0 * self.t * n * k, self.rate(), bytes)
    }

    /// Of the rows that sample.
    fn head(&self) -> f64 {
        let (rows, vocab) = (f64::from(self.case.sequences), f64::from(self.config.vocab_size));
        let bytes = 2.0 * vocab * self.hidden + rows * (2.0 * self.hidden + 4.0 * vocab);
        self.longer(2.0 * rows * vocab * self.hidden, self.rates.bf16, bytes)
    }

    fn longer(&self, operations: f64, rate: f64, bytes: f64) -> f64 {
        (operations / rate).max(self.bytes(bytes))
    }

    fn bytes(&self, bytes: f64) -> f64 {
        bytes / self.rates.bytes
    }

    fn fp8(&self) -> bool {
        self.config.quantization.is_some()
    }

    fn rate(&self) -> f64 {
        if self.fp8() { self.rates.fp8 } else { self.rates.bf16 }
    }

    /// Bytes of a weight with its share of the scales.
    fn element(&self) -> f64 {
        if self.fp8() { 1.0 + 4.0 / 16384.0 } else { 2.0 }
    }

    /// Bytes of a row of activations as a product reads them.
    fn quantized(&self, width: f64) -> f64 {
        if self.fp8() { width * (1.0 + 4.0 / 128.0) } else { 2.0 * width }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn slice(case: &str) -> f64 {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/bench/slice9");
        let config = model::random_directory(&path, 0).unwrap().config;
        1e3 * seconds(&config, &case.parse().unwrap(), &Rates::H200)
    }

    /// Milliseconds added up by hand for one dense and eight sparse layers of DeepSeek-V3 with the head.
    #[test]
    fn floors_are_those_computed_by_hand() {
        for (case, expected) in [
            ("decode:1x4096", 1.71),
            ("decode:32x4096", 14.91),
            ("decode:128x4096", 23.61),
            ("decode:256x4096", 26.19),
            ("prefill:1x4096", 46.6),
            ("prefill:4x4096", 149.8),
            ("prefill:1x16384", 243.8),
        ] {
            let found = slice(case);
            assert!((found / expected - 1.0).abs() < 0.01, "{case}: {found} ms, expected {expected}");
        }
    }

    #[test]
    fn more_work_takes_longer() {
        assert!(slice("decode:32x16384") > slice("decode:32x4096"));
        assert!(slice("prefill:1x16384") > slice("prefill:4x4096"));
    }
}
