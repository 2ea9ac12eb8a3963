//! Which tensors a model consists of, by name and shape, as DeepSeek and Hugging Face publish them.

use crate::{Config, config::Moe};

pub const EMBEDDING: &str = "model.embed_tokens.weight";
pub const FINAL_NORM: &str = "model.norm.weight";
pub const HEAD: &str = "lm_head.weight";
pub const SCALE_SUFFIX: &str = "_scale_inv";

/// A tensor that must be present. Matrices may be FP8 with block scales if `quantizable`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub name: String,
    pub shape: Vec<usize>,
    pub quantizable: bool,
}

impl Expected {
    fn plain(name: impl Into<String>, shape: &[u32]) -> Expected {
        Expected { name: name.into(), shape: shape.iter().map(|n| *n as usize).collect(), quantizable: false }
    }

    fn quantizable(name: String, shape: &[u32]) -> Expected {
        Expected { quantizable: true, ..Expected::plain(name, shape) }
    }
}

pub fn layer(layer: u32) -> String {
    format!("model.layers.{layer}.")
}

pub fn expert(layer: u32, expert: u32) -> String {
    format!("model.layers.{layer}.mlp.experts.{expert}.")
}

/// Every tensor of the main model.
pub fn expected(config: &Config) -> impl Iterator<Item = Expected> + '_ {
    let (vocab, hidden) = (config.vocab_size, config.hidden);
    let outer = [Expected::plain(EMBEDDING, &[vocab, hidden]), Expected::plain(FINAL_NORM, &[hidden])];
    let head = (!config.tied_head).then(|| Expected::plain(HEAD, &[vocab, hidden]));
    outer.into_iter().chain(head).chain((0..config.layers).flat_map(|layer| layer_tensors(config, layer)))
}

/// Whether a name belongs to a multi-token-prediction module: a layer after the main ones.
pub fn is_mtp(config: &Config, name: &str) -> bool {
    name.strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(index, _)| index.parse::<u32>().ok())
        .is_some_and(|index| index >= config.layers)
}

fn layer_tensors(config: &Config, index: u32) -> Vec<Expected> {
    let prefix = layer(index);
    let mut tensors = attention(config, &prefix);
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        tensors.push(Expected::plain(format!("{prefix}{norm}.weight"), &[config.hidden]));
    }
    match config.moe_of(index) {
        None => tensors.extend(mlp(&format!("{prefix}mlp."), config.hidden, config.dense_width)),
        Some(moe) => tensors.extend(sparse(config, moe, index)),
    }
    tensors
}

fn attention(config: &Config, prefix: &str) -> Vec<Expected> {
    let query = config.heads * (config.nope + config.rope_dim);
    let (hidden, latent) = (config.hidden, config.kv_lora_rank);
    let matrix =
        |name: &str, shape: &[u32]| Expected::quantizable(format!("{prefix}self_attn.{name}.weight"), shape);
    let vector = |name: &str, size: u32| Expected::plain(format!("{prefix}self_attn.{name}.weight"), &[size]);
    let mut tensors = match config.q_lora_rank {
        None => vec![matrix("q_proj", &[query, hidden])],
        Some(rank) => vec![
            matrix("q_a_proj", &[rank, hidden]),
            vector("q_a_layernorm", rank),
            matrix("q_b_proj", &[query, rank]),
        ],
    };
    tensors.extend([
        matrix("kv_a_proj_with_mqa", &[latent + config.rope_dim, hidden]),
        vector("kv_a_layernorm", latent),
        matrix("kv_b_proj", &[config.heads * (config.nope + config.value), latent]),
        matrix("o_proj", &[hidden, config.heads * config.value]),
    ]);
    tensors
}

fn mlp(prefix: &str, hidden: u32, width: u32) -> [Expected; 3] {
    [
        Expected::quantizable(format!("{prefix}gate_proj.weight"), &[width, hidden]),
        Expected::quantizable(format!("{prefix}up_proj.weight"), &[width, hidden]),
        Expected::quantizable(format!("{prefix}down_proj.weight"), &[hidden, width]),
    ]
}

fn sparse(config: &Config, moe: &Moe, index: u32) -> Vec<Expected> {
    let prefix = layer(index);
    let mut tensors =
        vec![Expected::plain(format!("{prefix}mlp.gate.weight"), &[moe.experts, config.hidden])];
    if moe.correction_bias {
        tensors.push(Expected::plain(format!("{prefix}mlp.gate.e_score_correction_bias"), &[moe.experts]));
    }
    if moe.shared_width > 0 {
        tensors.extend(mlp(&format!("{prefix}mlp.shared_experts."), config.hidden, moe.shared_width));
    }
    for e in 0..moe.experts {
        tensors.extend(mlp(&expert(index, e), config.hidden, moe.width));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    const DEEPSEEK_V3: &str = r#"{
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
    "routed_scaling_factor": 2.5, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "max_position_embeddings": 163840, "tie_word_embeddings": false,
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}
}"#;

    /// Fields of the published config.json files that say how large the model is.
    fn published(family: &str) -> Config {
        let yarn = |factor: u32, fast: u32, mscale: f32| {
            json!({"type": "yarn", "factor": factor, "original_max_position_embeddings": 4096, "beta_fast": fast,
                "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale})
        };
        let mut fields: Value = serde_json::from_str(DEEPSEEK_V3).unwrap();
        fields["rope_scaling"] = yarn(40, 32, 1.0);
        let other = match family {
            "V2-Lite" => json!({
                "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
                "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
                "num_hidden_layers": 27, "num_nextn_predict_layers": null, "first_k_dense_replace": 1,
                "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": null, "n_routed_experts": 64,
                "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1,
                "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": false,
                "routed_scaling_factor": 1.0, "rope_scaling": yarn(40, 32, 0.707), "quantization_config": null,
            }),
            "Kimi-K2" => json!({
                "model_type": "kimi_k2", "vocab_size": 163840, "num_nextn_predict_layers": 0,
                "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64,
                "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
                "rope_theta": 50000, "rope_scaling": yarn(32, 1, 1.0), "max_position_embeddings": 131072,
                "eos_token_id": 163585, "bos_token_id": 163584,
            }),
            _ => json!({}),
        };
        for (key, value) in other.as_object().into_iter().flatten() {
            fields[key] = value.clone();
            if *value == Value::Null && key != "q_lora_rank" {
                fields.as_object_mut().unwrap().remove(key);
            }
        }
        Config::parse(Path::new("config.json"), &fields.to_string()).unwrap()
    }

    fn parameters(config: &Config) -> f64 {
        expected(config).map(|tensor| tensor.shape.iter().product::<usize>() as f64).sum()
    }

    #[test]
    fn the_published_models_have_their_published_sizes() {
        let v3 = published("V3");
        let scales = expected(&v3).filter(|tensor| tensor.quantizable).count();
        assert_eq!(
            expected(&v3).count() + scales,
            58 * 1558 + 3 * 20 + 3,
            "tensors of DeepSeek-V3 without MTP"
        );
        for (family, billions, scale) in
            [("V3", 671.03, 0.13523378), ("V2-Lite", 15.71, 0.11472139), ("Kimi-K2", 1026.4, 0.13086080)]
        {
            let config = published(family);
            let found = parameters(&config) / 1e9;
            assert!((found / billions - 1.0).abs() < 1e-3, "{family}: {found} billion parameters");
            let found = config.rope.softmax_scale(config.nope + config.rope_dim);
            assert!((found - scale).abs() < 1e-7, "{family}: softmax scale {found}");
        }
    }

    #[test]
    fn shapes_are_those_of_the_published_tensors() {
        let shape = |family: &str, name: &str| {
            expected(&published(family)).find(|tensor| tensor.name == name).map(|tensor| tensor.shape)
        };
        for (family, name, expected) in [
            ("V3", "model.layers.60.self_attn.q_b_proj.weight", vec![24576, 1536]),
            ("V3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", vec![576, 7168]),
            ("V3", "model.layers.3.mlp.experts.255.down_proj.weight", vec![7168, 2048]),
            ("V2-Lite", "model.layers.1.mlp.shared_experts.gate_proj.weight", vec![2816, 2048]),
            ("V2-Lite", "model.layers.0.self_attn.q_proj.weight", vec![3072, 2048]),
            ("Kimi-K2", "model.layers.1.mlp.gate.e_score_correction_bias", vec![384]),
        ] {
            assert_eq!(shape(family, name), Some(expected), "{family} {name}");
        }
        assert_eq!(
            shape("V3", "model.layers.61.mlp.gate.weight"),
            None,
            "multi-token prediction is left for later"
        );
        assert!(is_mtp(&published("V3"), "model.layers.61.eh_proj.weight"));
    }
}
