//! A model directory in Hugging Face layout, read once at start. A file that is missing or wrong is named,
//! with what was expected and what to do.

use super::Template;
use crate::Error;
use crate::text::Vocabulary;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tokenizers::Tokenizer;

pub struct Model {
    pub vocabulary: Vocabulary,
    /// `None`: the directory has no chat template, so only completions are served.
    pub template: Option<Template>,
    pub defaults: Defaults,
    pub eos_ids: Vec<u32>,
    /// Tokens of prompt and output together.
    pub max_context: u32,
    /// Of the files read, to compare with what the workers read.
    pub files: u64,
    /// Rows of the embedding: token ids are below this.
    pub vocab_size: u32,
}

/// What generation_config.json says for requests that do not say it themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    pub min_p: f32,
    pub repetition_penalty: f32,
}

impl Model {
    /// `max_context`: 0 for what config.json says.
    pub fn load(dir: &Path, max_context: u32) -> Result<Self, Error> {
        let config: ModelConfig = read(dir, "config.json")?;
        let tokenizer_config: TokenizerConfig = read_or_default(dir, "tokenizer_config.json")?;
        let generation: GenerationConfig = read_or_default(dir, "generation_config.json")?;
        let vocabulary = vocabulary(dir, &tokenizer_config)?;
        let template = template(dir, &tokenizer_config)?;
        let eos_ids = eos_ids(dir, &generation, &config)?;
        let vocab_size = config.vocab_size.unwrap_or(vocabulary.len() as u32);
        let max_context = context(dir, &config, max_context)?;
        Ok(Model {
            vocabulary,
            template,
            defaults: Defaults::new(&generation),
            eos_ids,
            max_context,
            files: proto::files_fingerprint(dir).map_err(|error| Error::model(dir, error))?,
            vocab_size,
        })
    }
}

#[derive(Default, Deserialize)]
struct ModelConfig {
    max_position_embeddings: Option<u32>,
    vocab_size: Option<u32>,
    eos_token_id: Option<OneOrMore>,
}

#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    add_bos_token: Option<bool>,
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    pad_token: Option<TokenText>,
    unk_token: Option<TokenText>,
    chat_template: Option<ChatTemplates>,
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    eos_token_id: Option<OneOrMore>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(u32),
    More(Vec<u32>),
}

/// A token as plain text or as a serialised `AddedToken`.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Added { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl TokenText {
    fn text(&self) -> &str {
        match self {
            TokenText::Plain(text) | TokenText::Added { content: text } => text,
        }
    }
}

impl Defaults {
    /// `do_sample: false` means greedy, as in transformers; where nothing is said, OpenAI's defaults hold.
    fn new(generation: &GenerationConfig) -> Self {
        let greedy = generation.do_sample == Some(false);
        Defaults {
            temperature: if greedy { 0.0 } else { generation.temperature.unwrap_or(1.0) },
            top_p: generation.top_p.unwrap_or(1.0),
            top_k: generation.top_k.unwrap_or(0),
            min_p: generation.min_p.unwrap_or(0.0),
            repetition_penalty: generation.repetition_penalty.unwrap_or(1.0),
        }
    }
}

fn vocabulary(dir: &Path, config: &TokenizerConfig) -> Result<Vocabulary, Error> {
    let path = dir.join("tokenizer.json");
    if !path.exists() {
        return Err(Error::model(
            &path,
            "missing. A model that ships another tokenizer format (Kimi-K2: tiktoken.model) must be converted once: \
             load it with transformers' AutoTokenizer and save_pretrained as a fast tokenizer",
        ));
    }
    let tokenizer = Tokenizer::from_file(&path).map_err(|error| Error::model(&path, error))?;
    let bos = config.bos_token.as_ref().filter(|_| config.add_bos_token == Some(true));
    let bos = bos.and_then(|token| tokenizer.token_to_id(token.text()));
    Vocabulary::new(tokenizer, bos).map_err(|error| Error::model(&path, error))
}

/// chat_template.jinja goes before the template in tokenizer_config.json; of named ones "default" is taken.
fn template(dir: &Path, config: &TokenizerConfig) -> Result<Option<Template>, Error> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        let source = std::fs::read_to_string(&file).map_err(|error| Error::model(&file, error))?;
        return Template::new(source, variables(config))
            .map(Some)
            .map_err(|error| Error::model(&file, error));
    }
    let path = dir.join("tokenizer_config.json");
    let source = match &config.chat_template {
        None => return Ok(None),
        Some(ChatTemplates::One(source)) => source,
        Some(ChatTemplates::Named(list)) => &default_of(list).ok_or_else(|| {
            Error::model(&path, "chat_template is a list without one named \"default\"; name one so, or add chat_template.jinja")
        })?.template,
    };
    Template::new(source.clone(), variables(config)).map(Some).map_err(|error| Error::model(&path, error))
}

fn default_of(list: &[NamedTemplate]) -> Option<&NamedTemplate> {
    list.iter().find(|named| named.name == "default")
}

/// The special tokens by the names that templates use.
fn variables(config: &TokenizerConfig) -> BTreeMap<String, Value> {
    let tokens = [
        ("bos_token", &config.bos_token),
        ("eos_token", &config.eos_token),
        ("pad_token", &config.pad_token),
        ("unk_token", &config.unk_token),
    ];
    let text = |token: &TokenText| Value::String(token.text().to_owned());
    tokens.into_iter().filter_map(|(name, token)| Some((name.to_owned(), text(token.as_ref()?)))).collect()
}

/// generation_config.json knows all ends of a chat model, config.json often only one.
fn eos_ids(dir: &Path, generation: &GenerationConfig, config: &ModelConfig) -> Result<Vec<u32>, Error> {
    match generation.eos_token_id.as_ref().or(config.eos_token_id.as_ref()) {
        Some(OneOrMore::One(id)) => Ok(vec![*id]),
        Some(OneOrMore::More(ids)) if !ids.is_empty() => Ok(ids.clone()),
        _ => Err(Error::model(
            &dir.join("config.json"),
            "eos_token_id is missing, here and in generation_config.json: no answer would ever end",
        )),
    }
}

fn context(dir: &Path, config: &ModelConfig, wanted: u32) -> Result<u32, Error> {
    match (wanted, config.max_position_embeddings) {
        (0, Some(own)) => Ok(own),
        (0, None) => {
            Err(Error::model(&dir.join("config.json"), "max_position_embeddings is missing; set max_context"))
        }
        (wanted, Some(own)) if wanted > own => Err(Error::model(
            &dir.join("config.json"),
            format!("max_context is {wanted}, but the model reaches only {own} (max_position_embeddings)"),
        )),
        (wanted, _) => Ok(wanted),
    }
}

fn read<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T, Error> {
    let path = dir.join(name);
    let bytes = std::fs::read(&path).map_err(|error| Error::model(&path, error))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::model(&path, error))
}

fn read_or_default<T: DeserializeOwned + Default>(dir: &Path, name: &str) -> Result<T, Error> {
    if dir.join(name).exists() { read(dir, name) } else { Ok(T::default()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demo() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/demo/checkpoint")
    }

    #[test]
    fn the_demo_model_is_read() {
        let model = Model::load(&demo(), 0).unwrap();
        assert_eq!((model.max_context, model.vocab_size, model.eos_ids.clone()), (2048, 4096, vec![1]));
        assert_eq!(model.defaults.temperature, 0.0, "do_sample is false");
        assert!(model.template.is_some());
        assert!(Model::load(&demo(), 4096).is_err_and(|error| error.to_string().contains("2048")));
    }

    #[test]
    fn a_missing_tokenizer_says_how_to_convert() {
        let dir = std::env::temp_dir().join(format!("gateway-model-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.json"), r#"{"max_position_embeddings": 8, "eos_token_id": [1, 2]}"#)
            .unwrap();
        let error = Model::load(&dir, 0).err().unwrap().to_string();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(error.contains("tokenizer.json") && error.contains("save_pretrained"), "{error}");
    }

    #[test]
    fn sampling_defaults_are_the_models_own() {
        let of = |json: &str| Defaults::new(&serde_json::from_str(json).unwrap());
        assert_eq!(of(r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.95}"#).top_p, 0.95);
        assert_eq!(of(r#"{"do_sample": false, "temperature": 0.6}"#).temperature, 0.0);
        assert_eq!(of("{}").temperature, 1.0);
    }
}
