//! From a checked directory to weights on a backend, tensor by tensor.

use crate::{
    Directory, Error,
    config::Moe,
    forward::{FeedForward, Layer, Network},
    names,
};
use kernels::{Backend, MlaTensors, MlpTensors, QueryTensors, Tensor};
use std::cell::RefCell;

/// eps of the norms inside attention: DeepSeek's and Hugging Face's code both build them with this default,
/// whatever `rms_norm_eps` says.
const INNER_EPS: f32 = 1e-6;

pub(crate) struct Loader<'a, B> {
    pub directory: &'a Directory,
    pub backend: &'a mut B,
}

impl<B: Backend> Loader<'_, B> {
    pub fn network(&mut self) -> Result<Network<B>, Error> {
        let config = &self.directory.config;
        let head = if config.tied_head { names::EMBEDDING } else { names::HEAD };
        Ok(Network {
            embedding: self.table(names::EMBEDDING)?,
            layers: (0..config.layers).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?,
            norm: self.table(names::FINAL_NORM)?,
            head: self.linear(&[head.to_string()])?,
            eps: config.rms_norm_eps,
        })
    }

    fn layer(&mut self, layer: u32) -> Result<Layer<B>, Error> {
        let prefix = names::layer(layer);
        Ok(Layer {
            input_norm: self.table(&format!("{prefix}input_layernorm.weight"))?,
            mla: self.mla(&prefix)?,
            output: self.linear(&[format!("{prefix}self_attn.o_proj.weight")])?,
            post_norm: self.table(&format!("{prefix}post_attention_layernorm.weight"))?,
            feed_forward: match self.directory.config.moe_of(layer) {
                None => self.dense(&prefix)?,
                Some(moe) => self.sparse(moe, layer)?,
            },
        })
    }

    fn mla(&mut self, prefix: &str) -> Result<B::Mla, Error> {
        let name = |part: &str| format!("{prefix}self_attn.{part}.weight");
        let [q, q_a, q_norm, q_b] = ["q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj"].map(name);
        let [kv_a, kv_norm, kv_b] = ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"].map(name);
        let directory = self.directory;
        let query = match directory.config.q_lora_rank {
            None => QueryTensors::Direct(directory.tensor(&q)?),
            Some(_) => QueryTensors::LowRank {
                a: directory.tensor(&q_a)?,
                norm: directory.tensor(&q_norm)?,
                b: directory.tensor(&q_b)?,
            },
        };
        let tensors = MlaTensors {
            query,
            kv_a: directory.tensor(&kv_a)?,
            kv_norm: directory.tensor(&kv_norm)?,
            kv_b: directory.tensor(&kv_b)?,
            eps: INNER_EPS,
        };
        let mla = self.backend.load_mla(&tensors).map_err(|cause| self.failed(cause))?;
        [&q, &q_a, &q_b, &kv_a, &kv_b].into_iter().for_each(|name| directory.forget(name));
        Ok(mla)
    }

    fn dense(&mut self, prefix: &str) -> Result<FeedForward<B>, Error> {
        let (gate_up, down) = self.mlp(&format!("{prefix}mlp."))?;
        Ok(FeedForward::Dense { gate_up, down })
    }

    fn sparse(&mut self, moe: &Moe, layer: u32) -> Result<FeedForward<B>, Error> {
        let prefix = format!("{}mlp.", names::layer(layer));
        let bias = format!("{prefix}gate.e_score_correction_bias");
        Ok(FeedForward::Sparse {
            gate: self.linear(&[format!("{prefix}gate.weight")])?,
            bias: moe.correction_bias.then(|| self.table(&bias)).transpose()?,
            rule: moe.rule,
            experts: self.experts(moe, layer)?,
            shared: (moe.shared_width > 0)
                .then(|| self.mlp(&format!("{prefix}shared_experts.")))
                .transpose()?,
        })
    }

    /// Hands the experts over one by one; the pages of one are dropped when the next is asked for.
    fn experts(&mut self, moe: &Moe, layer: u32) -> Result<B::Experts, Error> {
        let directory = self.directory;
        let names: Vec<[String; 3]> = (0..moe.experts)
            .map(|e| {
                ["gate_proj", "up_proj", "down_proj"]
                    .map(|part| format!("{}{part}.weight", names::expert(layer, e)))
            })
            .collect();
        let failed = RefCell::new(None);
        let mut previous: Option<&[String; 3]> = None;
        let mut tensors = names.iter().map_while(|names| {
            previous.replace(names).into_iter().flatten().for_each(|name| directory.forget(name));
            let [gate, up, down] = names.each_ref().map(|name| directory.tensor(name));
            match (gate, up, down) {
                (Ok(gate), Ok(up), Ok(down)) => Some(MlpTensors { gate, up, down }),
                (Err(e), ..) | (_, Err(e), _) | (.., Err(e)) => {
                    *failed.borrow_mut() = Some(e);
                    None
                }
            }
        });
        let experts = self.backend.load_experts(names.len(), &mut tensors);
        drop(tensors);
        names.last().into_iter().flatten().for_each(|name| directory.forget(name));
        match failed.into_inner() {
            Some(error) => Err(error),
            None => experts.map_err(|cause| self.failed(cause)),
        }
    }

    fn mlp(&mut self, prefix: &str) -> Result<(B::Linear, B::Linear), Error> {
        let gate_up = ["gate_proj", "up_proj"].map(|part| format!("{prefix}{part}.weight"));
        Ok((self.linear(&gate_up)?, self.linear(&[format!("{prefix}down_proj.weight")])?))
    }

    fn linear(&mut self, names: &[String]) -> Result<B::Linear, Error> {
        let directory = self.directory;
        let parts: Vec<Tensor<'_>> =
            names.iter().map(|name| directory.tensor(name)).collect::<Result<_, _>>()?;
        let linear = self.backend.load_linear(&parts).map_err(|cause| self.failed(cause))?;
        names.iter().for_each(|name| directory.forget(name));
        Ok(linear)
    }

    fn table(&mut self, name: &str) -> Result<B::Table, Error> {
        let table =
            self.backend.load_table(self.directory.tensor(name)?).map_err(|cause| self.failed(cause))?;
        self.directory.forget(name);
        Ok(table)
    }

    /// A backend knows tensors by name only; this adds where they are.
    fn failed(&self, cause: kernels::Error) -> Error {
        let path = match &cause {
            kernels::Error::Tensor { name, .. } => self.directory.file_of(name),
            _ => None,
        };
        Error::Weights { path: path.unwrap_or(&self.directory.path).to_path_buf(), cause }
    }
}
