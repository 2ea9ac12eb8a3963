//! A model's directory: config.json, tokenizer, weights, each read as the services read it, and room in memory for them.

use super::{
    finding::Finding,
    memory::{self, Memory},
};
use std::path::{Path, PathBuf};

const CHECK: &str = "model";

/// A directory, and what is to read its weights.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Directory {
    pub path: PathBuf,
    /// Empty: not known.
    pub backend: String,
    /// Only config.json is read: a gateway's or a simulated worker's, or of random weights.
    pub without_weights: bool,
}

/// What was read, or the message of whoever could not read it.
pub struct Found {
    pub config: Result<String, String>,
    pub text: Result<bool, String>,
    /// Not looked for, if absent.
    pub weights: Option<Result<model::Stored, String>>,
    pub memory: Option<Memory>,
}

pub fn gather(directory: &Directory) -> Found {
    let path = &directory.path;
    let config_path = path.join("config.json");
    let text =
        std::fs::read_to_string(&config_path).map_err(|error| format!("{}: {error}", config_path.display()));
    let config =
        text.and_then(|text| model::Config::parse(&config_path, &text).map_err(|error| error.to_string()));
    let weights = match &config {
        Ok(config) if !directory.without_weights => {
            Some(model::check_weights(path, config).map_err(|error| error.to_string()))
        }
        _ => None,
    };
    let config = config.map(|config| {
        let fp8 = if config.quantization.is_some() { ", FP8" } else { "" };
        format!("{}, {} layers, hidden {}{fp8}", config.model_type, config.layers, config.hidden)
    });
    let text = gateway::check_model(path).map_err(|error| error.to_string());
    Found { config, text, weights, memory: memory::gather() }
}

pub fn judge(directory: &Directory, found: &Found) -> Vec<Finding> {
    let path = &directory.path;
    let mut findings = vec![match &found.config {
        Ok(what) => Finding::ok(CHECK, part(path, "config.json"), what),
        Err(why) => Finding::error(CHECK, part(path, "config.json"), without(path, why))
            .expected("the config.json of a model of DeepSeek-V3's architecture")
            .remedy("give the directory of a model that Baton serves, as its repository has it"),
    }];
    // Whoever cannot read config.json cannot read the rest either.
    if found.config.is_ok() {
        findings.push(text(path, &found.text));
        findings.extend(found.weights.as_ref().map(|weights| self::weights(path, weights)));
    }
    if let Some(Ok(stored)) = &found.weights {
        findings.extend(room(directory, stored, found.memory.as_ref()));
    }
    findings
}

fn part(path: &Path, name: &str) -> String {
    path.join(name).display().to_string()
}

/// The message without the path, which is the subject already.
fn without(path: &Path, why: &str) -> String {
    why.replace(&format!("{}/", path.display()), "").replace(&format!("{}: ", path.display()), "")
}

fn text(path: &Path, text: &Result<bool, String>) -> Finding {
    let subject = part(path, "tokenizer.json");
    match text {
        Ok(true) => Finding::ok(CHECK, subject, "read, with a chat template"),
        Ok(false) => Finding::warning(CHECK, subject, "read, but there is no chat template")
            .expected("a chat_template in tokenizer_config.json, or chat_template.jinja: chat is refused without")
            .remedy("download tokenizer_config.json and chat_template.jinja from the model's repository"),
        Err(why) => Finding::error(CHECK, subject, without(path, why))
            .expected("tokenizer.json and its companions, as the gateway reads them")
            .remedy("download tokenizer.json and tokenizer_config.json from the model's repository into this directory"),
    }
}

fn weights(path: &Path, weights: &Result<model::Stored, String>) -> Finding {
    match weights {
        Ok(stored) => {
            let dtypes: Vec<String> = stored.dtypes.iter().map(|(dtype, n)| format!("{n} {dtype}")).collect();
            let found = format!("complete: {} in tensors {}", gigabytes(stored.bytes), dtypes.join(", "));
            Finding::ok(CHECK, part(path, "weights"), found)
        }
        Err(why) => Finding::error(CHECK, part(path, "weights"), without(path, why))
            .expected("every tensor of the model, whole, of a type and shape that Baton reads")
            .remedy("fetch the file that is named again, and compare its size with the repository's"),
    }
}

/// On a CPU weights are kept in f32. A GPU's memory is looked at by the check of the GPU.
fn room(directory: &Directory, stored: &model::Stored, memory: Option<&Memory>) -> Option<Finding> {
    let subject = part(&directory.path, "memory");
    let needed = stored.parameters * 4;
    if directory.backend != "cpu" {
        return None;
    }
    let Some(memory) = memory else {
        return Some(Finding::not_checked(
            CHECK,
            subject,
            "this machine does not tell its memory (/proc/meminfo)",
        ));
    };
    let limit = memory.limit.as_ref().map(|file| format!(", the limit in {}", file.display()));
    let found = format!(
        "weights in f32 take {}, {} of {} are available{}",
        gigabytes(needed),
        gigabytes(memory.available),
        gigabytes(memory.all),
        limit.as_deref().unwrap_or_default()
    );
    let finding = match needed {
        _ if needed > memory.all => Finding::error(CHECK, subject, found),
        _ if needed > memory.available => Finding::warning(CHECK, subject, found),
        _ => return Some(Finding::ok(CHECK, subject, found)),
    };
    let more = if memory.limit.is_some() { "raise that limit" } else { "use a machine with more memory" };
    Some(
        finding
            .expected("room for the weights, and for the KV cache beside them")
            .remedy(format!("{more}, or use --backend cuda, where weights stay as the checkpoint has them")),
    )
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    fn sound() -> Found {
        let stored = model::Stored { parameters: 1_000_000_000, bytes: 2_000_000_000, ..Default::default() };
        Found {
            config: Ok("deepseek_v3".into()),
            text: Ok(true),
            weights: Some(Ok(stored)),
            memory: Some(Memory { all: 16_000_000_000, available: 8_000_000_000, limit: None }),
        }
    }

    fn problems(found: Found) -> Vec<(Severity, String)> {
        let directory = Directory { path: "/m".into(), backend: "cpu".into(), without_weights: false };
        let bad = judge(&directory, &found).into_iter().filter(|finding| finding.severity > Severity::Ok);
        bad.map(|finding| (finding.severity, finding.found)).collect()
    }

    #[test]
    fn each_fault_is_one_finding() {
        assert_eq!(problems(sound()), []);
        let error = |found: Found, part: &str| {
            let found = problems(found);
            assert!(
                found.len() == 1 && found[0].0 == Severity::Error && found[0].1 == part,
                "{part}: {found:?}"
            );
        };
        error(
            Found { config: Err("/m/config.json: gone".into()), weights: None, ..sound() },
            "config.json: gone",
        );
        error(Found { text: Err("/m: no tokenizer".into()), ..sound() }, "no tokenizer");
        error(Found { weights: Some(Err("/m/a: truncated".into())), ..sound() }, "a: truncated");
        assert_eq!(problems(Found { text: Ok(false), ..sound() })[0].0, Severity::Warning);
    }

    #[test]
    fn weights_must_fit() {
        let with = |all, available| {
            let limit = Some("/sys/fs/cgroup/memory.max".into());
            problems(Found { memory: Some(Memory { all, available, limit }), ..sound() })
        };
        let (severity, found) = with(3_000_000_000, 2_000_000_000).remove(0);
        assert_eq!(severity, Severity::Error);
        assert!(
            found.ends_with("2.00 GB of 3.00 GB are available, the limit in /sys/fs/cgroup/memory.max"),
            "{found}"
        );
        assert_eq!(with(8_000_000_000, 2_000_000_000)[0].0, Severity::Warning);
        assert_eq!(problems(Found { memory: None, ..sound() })[0].0, Severity::NotChecked);
    }
}
