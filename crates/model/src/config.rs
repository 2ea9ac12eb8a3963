//! config.json: the published spellings in, one checked [`Config`] out. A value that this crate does not implement is an
//! error that names it.

use crate::{Error, Rope, Yarn, generation::OneOrMany};
use kernels::{GateRule, GroupScore, Scoring};
use serde::Deserialize;
use serde_json::Value;
use std::path::Path;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    DeepseekV2,
    /// Also Kimi-K2, which differs by numbers only.
    DeepseekV3,
}

/// FP8 weights (e4m3, f32 multipliers per block).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    pub block: [usize; 2],
    /// Activation scales are rounded up to powers of two.
    pub ue8m0: bool,
}

/// The mixture of experts of the sparse layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    pub experts: u32,
    /// Width of one expert.
    pub width: u32,
    /// Width of the shared expert; 0: none.
    pub shared_width: u32,
    /// Layers before this one are dense, and from here every `every`-th is sparse.
    pub first_layer: u32,
    pub every: u32,
    pub correction_bias: bool,
    pub rule: GateRule,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub architecture: Architecture,
    pub model_type: String,
    pub vocab_size: u32,
    pub hidden: u32,
    /// Main layers; MTP modules come after them and are not counted.
    pub layers: u32,
    pub mtp_layers: u32,
    pub dense_width: u32,
    pub moe: Option<Moe>,
    pub heads: u32,
    pub q_lora_rank: Option<u32>,
    pub kv_lora_rank: u32,
    pub nope: u32,
    pub rope_dim: u32,
    pub value: u32,
    pub rms_norm_eps: f32,
    pub rope: Rope,
    pub max_positions: u32,
    pub tied_head: bool,
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub quantization: Option<Quantization>,
}

/// The fields as published; what is absent has the value that the family's configuration class gives it.
#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    model_type: String,
    vocab_size: u32,
    hidden_size: u32,
    num_hidden_layers: u32,
    #[serde(default)]
    num_nextn_predict_layers: Option<u32>,
    intermediate_size: u32,
    moe_intermediate_size: Option<u32>,
    n_routed_experts: Option<u32>,
    n_shared_experts: Option<u32>,
    num_experts_per_tok: Option<u32>,
    first_k_dense_replace: Option<u32>,
    moe_layer_freq: Option<u32>,
    n_group: Option<u32>,
    topk_group: Option<u32>,
    topk_method: Option<String>,
    scoring_func: Option<String>,
    norm_topk_prob: Option<bool>,
    routed_scaling_factor: Option<f32>,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    q_lora_rank: Option<u32>,
    kv_lora_rank: u32,
    qk_nope_head_dim: u32,
    qk_rope_head_dim: u32,
    v_head_dim: u32,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    rope_interleave: Option<bool>,
    max_position_embeddings: u32,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<OneOrMany>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RawRope {
    /// Some files have both spellings.
    r#type: Option<String>,
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: String,
    fmt: Option<String>,
    weight_block_size: Option<[usize; 2]>,
    activation_scheme: Option<String>,
    scale_fmt: Option<String>,
}

impl Config {
    /// `path` is config.json, for messages.
    pub fn parse(path: &Path, text: &str) -> Result<Config, Error> {
        let value: Value = serde_json::from_str(text).map_err(|e| Error::malformed(path, e.to_string()))?;
        let architecture = architecture(path, &value)?;
        let mut raw: Raw =
            serde_json::from_value(value).map_err(|e| Error::malformed(path, e.to_string()))?;
        raw.check_fixed(path)?;
        let rope = raw.rope(path)?;
        let config = Config {
            architecture,
            moe: raw.moe(path, architecture)?,
            rope,
            quantization: raw.quantization(path)?,
            model_type: raw.model_type,
            vocab_size: raw.vocab_size,
            hidden: raw.hidden_size,
            layers: raw.num_hidden_layers,
            mtp_layers: raw.num_nextn_predict_layers.unwrap_or(0),
            dense_width: raw.intermediate_size,
            heads: raw.num_attention_heads,
            q_lora_rank: raw.q_lora_rank,
            kv_lora_rank: raw.kv_lora_rank,
            nope: raw.qk_nope_head_dim,
            rope_dim: raw.qk_rope_head_dim,
            value: raw.v_head_dim,
            rms_norm_eps: raw.rms_norm_eps,
            max_positions: raw.max_position_embeddings,
            tied_head: raw.tie_word_embeddings.unwrap_or(false),
            bos: raw.bos_token_id,
            eos: OneOrMany::list(raw.eos_token_id),
        };
        config.check_sizes(path)?;
        Ok(config)
    }

    /// The sparse part of `layer`, if it is sparse.
    pub fn moe_of(&self, layer: u32) -> Option<&Moe> {
        self.moe.as_ref().filter(|moe| layer >= moe.first_layer && layer.is_multiple_of(moe.every))
    }

    fn check_sizes(&self, path: &Path) -> Result<(), Error> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden),
            ("num_hidden_layers", self.layers),
            ("intermediate_size", self.dense_width),
            ("num_attention_heads", self.heads),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.nope),
            ("qk_rope_head_dim", self.rope_dim),
            ("v_head_dim", self.value),
            ("max_position_embeddings", self.max_positions),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::malformed(path, format!("{name} is 0")));
        }
        if !self.rope_dim.is_multiple_of(2) {
            return Err(Error::malformed(
                path,
                format!("qk_rope_head_dim is {}, must be even", self.rope_dim),
            ));
        }
        Ok(())
    }
}

fn architecture(path: &Path, value: &Value) -> Result<Architecture, Error> {
    let names: Vec<&str> =
        value["architectures"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    match names.as_slice() {
        ["DeepseekV3ForCausalLM"] => Ok(Architecture::DeepseekV3),
        ["DeepseekV2ForCausalLM"] => Ok(Architecture::DeepseekV2),
        ["DeepseekV32ForCausalLM"] => Err(Error::unsupported(
            path,
            "DeepseekV32ForCausalLM: its sparse attention (lightning indexer) is not implemented",
        )),
        _ => Err(Error::unsupported(
            path,
            format!(
                "architectures is {}, expected [\"DeepseekV3ForCausalLM\"] or [\"DeepseekV2ForCausalLM\"]",
                value["architectures"]
            ),
        )),
    }
}

impl Raw {
    /// Fields of which one value is implemented.
    fn check_fixed(&self, path: &Path) -> Result<(), Error> {
        if let Some(act) = self.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::unsupported(path, format!("hidden_act is {act:?}, expected \"silu\"")));
        }
        if self.attention_bias == Some(true) {
            return Err(Error::unsupported(path, "attention_bias is true, expected false"));
        }
        if self.rope_interleave == Some(false) {
            return Err(Error::unsupported(path, "rope_interleave is false, expected adjacent pairs (true)"));
        }
        match self.num_key_value_heads {
            Some(heads) if heads != self.num_attention_heads => Err(Error::unsupported(
                path,
                format!(
                    "num_key_value_heads is {heads}, expected num_attention_heads, {}",
                    self.num_attention_heads
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Old spelling: `rope_theta` and `rope_scaling`; new: both in `rope_parameters`.
    fn rope(&mut self, path: &Path) -> Result<Rope, Error> {
        let scaling = self.rope_parameters.take().or(self.rope_scaling.take());
        let theta = scaling.as_ref().and_then(|s| s.rope_theta).or(self.rope_theta).unwrap_or(10_000.0);
        let yarn =
            scaling.map(|scaling| scaling.yarn(path, self.max_position_embeddings)).transpose()?.flatten();
        Ok(Rope { theta, yarn })
    }

    fn moe(&self, path: &Path, architecture: Architecture) -> Result<Option<Moe>, Error> {
        let Some(experts) = self.n_routed_experts.filter(|experts| *experts > 0) else {
            return Ok(None);
        };
        let need = |name: &str, value: Option<u32>| {
            value.filter(|v| *v > 0).ok_or_else(|| {
                Error::malformed(path, format!("{name} is absent or 0, but n_routed_experts is {experts}"))
            })
        };
        let width = need("moe_intermediate_size", self.moe_intermediate_size)?;
        let moe = Moe {
            experts,
            width,
            shared_width: self.n_shared_experts.unwrap_or(0) * width,
            first_layer: self.first_k_dense_replace.unwrap_or(0),
            every: need("moe_layer_freq", Some(self.moe_layer_freq.unwrap_or(1)))?,
            correction_bias: self.method(architecture) == "noaux_tc",
            rule: self.gate_rule(
                path,
                architecture,
                experts,
                need("num_experts_per_tok", self.num_experts_per_tok)?,
            )?,
        };
        Ok(Some(moe))
    }

    fn method(&self, architecture: Architecture) -> &str {
        match (&self.topk_method, architecture) {
            (Some(method), _) => method,
            (None, Architecture::DeepseekV3) => "noaux_tc",
            (None, Architecture::DeepseekV2) => "greedy",
        }
    }

    fn gate_rule(
        &self,
        path: &Path,
        architecture: Architecture,
        experts: u32,
        top_k: u32,
    ) -> Result<GateRule, Error> {
        let scoring = match (self.scoring_func.as_deref(), architecture) {
            (Some("sigmoid"), _) | (None, Architecture::DeepseekV3) => Scoring::Sigmoid,
            (Some("softmax"), _) | (None, Architecture::DeepseekV2) => Scoring::Softmax,
            (Some(other), _) => {
                return Err(Error::unsupported(
                    path,
                    format!("scoring_func is {other:?}, expected \"sigmoid\" or \"softmax\""),
                ));
            }
        };
        let grouped = (self.n_group.unwrap_or(1).max(1), self.topk_group.unwrap_or(1).max(1));
        let ((groups, kept_groups), group_score) = match self.method(architecture) {
            "noaux_tc" => (grouped, GroupScore::TopTwo),
            "group_limited_greedy" => (grouped, GroupScore::Max),
            "greedy" => ((1, 1), GroupScore::Max),
            other => {
                return Err(Error::unsupported(
                    path,
                    format!(
                        "topk_method is {other:?}, expected \"noaux_tc\", \"greedy\" or \"group_limited_greedy\""
                    ),
                ));
            }
        };
        let eligible = experts / groups * kept_groups;
        if !experts.is_multiple_of(groups) || kept_groups > groups || top_k > eligible {
            return Err(Error::malformed(
                path,
                format!(
                    "{top_k} experts per token cannot be chosen from {experts} in {kept_groups} of {groups} groups"
                ),
            ));
        }
        let scale = self.routed_scaling_factor.unwrap_or(1.0);
        let normalize = self.norm_topk_prob.unwrap_or(architecture == Architecture::DeepseekV3);
        if normalize && architecture == Architecture::DeepseekV2 {
            // Published codes differ on whether routed_scaling_factor then applies; no published model asks for it.
            return Err(Error::unsupported(
                path,
                "norm_topk_prob is true, expected false for DeepseekV2ForCausalLM",
            ));
        }
        Ok(GateRule { scoring, groups, kept_groups, group_score, top_k, normalize, scale })
    }

    fn quantization(&self, path: &Path) -> Result<Option<Quantization>, Error> {
        let Some(value) = self.quantization_config.clone().filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let raw: RawQuantization = serde_json::from_value(value)
            .map_err(|e| Error::malformed(path, format!("quantization_config: {e}")))?;
        raw.check(path).map(Some)
    }
}

impl RawQuantization {
    fn check(self, path: &Path) -> Result<Quantization, Error> {
        let expect = |name: &str, found: Option<&str>, expected: &str| match found {
            Some(found) if found != expected => Err(Error::unsupported(
                path,
                format!("quantization_config.{name} is {found:?}, expected {expected:?}"),
            )),
            _ => Ok(()),
        };
        expect("quant_method", Some(&self.quant_method), "fp8")?;
        expect("fmt", self.fmt.as_deref(), "e4m3")?;
        expect("activation_scheme", self.activation_scheme.as_deref(), "dynamic")?;
        expect("scale_fmt", self.scale_fmt.as_deref(), "ue8m0")?;
        match self.weight_block_size {
            Some(block) if block[0] > 0 && block[1] > 0 => {
                Ok(Quantization { block, ue8m0: self.scale_fmt.is_some() })
            }
            found => Err(Error::unsupported(
                path,
                format!(
                    "quantization_config.weight_block_size is {found:?}, expected two positive numbers such as [128, 128]"
                ),
            )),
        }
    }
}

impl RawRope {
    fn yarn(self, path: &Path, max_positions: u32) -> Result<Option<Yarn>, Error> {
        match self.rope_type.as_deref().or(self.r#type.as_deref()) {
            Some("default") | None if self.factor.is_none() => return Ok(None),
            Some("yarn") => {}
            other => {
                return Err(Error::unsupported(
                    path,
                    format!("rope scaling type is {other:?}, expected \"yarn\" or none"),
                ));
            }
        }
        let original = self.original_max_position_embeddings.unwrap_or(f64::from(max_positions));
        let factor = self.factor.unwrap_or(f64::from(max_positions) / original);
        if !(factor >= 1.0 && original >= 1.0) {
            return Err(Error::malformed(
                path,
                format!("yarn factor {factor} over {original} positions, expected both >= 1"),
            ));
        }
        Ok(Some(Yarn {
            factor,
            original_positions: original,
            beta_fast: self.beta_fast.unwrap_or(32.0),
            beta_slow: self.beta_slow.unwrap_or(1.0),
            mscale: self.mscale.unwrap_or(1.0),
            mscale_all_dim: self.mscale_all_dim.unwrap_or(0.0),
        }))
    }
}
