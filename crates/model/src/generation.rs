//! generation_config.json: defaults of sampling and the ids that end an answer.

use crate::Error;
use serde::Deserialize;
use std::path::Path;

/// What the model's makers recommend; a request overrides it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub eos: Vec<u32>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    pub fn list(ids: Option<OneOrMany>) -> Vec<u32> {
        match ids {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![id],
            Some(OneOrMany::Many(ids)) => ids,
        }
    }
}

impl GenerationDefaults {
    pub fn parse(path: &Path, text: &str) -> Result<GenerationDefaults, Error> {
        #[derive(Deserialize)]
        struct Raw {
            do_sample: Option<bool>,
            temperature: Option<f32>,
            top_p: Option<f32>,
            top_k: Option<u32>,
            eos_token_id: Option<OneOrMany>,
        }
        let raw: Raw = serde_json::from_str(text).map_err(|e| Error::malformed(path, e.to_string()))?;
        Ok(GenerationDefaults {
            do_sample: raw.do_sample,
            temperature: raw.temperature,
            top_p: raw.top_p,
            top_k: raw.top_k,
            eos: OneOrMany::list(raw.eos_token_id),
        })
    }
}
