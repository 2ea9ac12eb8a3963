//! A service's configuration: a TOML file, then `--set key=value` on top of it. What neither names
//! keeps its default; a key that the service does not know is an error that names it.

use anyhow::{Context, anyhow, bail};
use serde::de::DeserializeOwned;
use std::{fs, path::Path};
use toml::{Table, Value};

pub fn load<T: DeserializeOwned>(file: Option<&Path>, set: &[String]) -> anyhow::Result<T> {
    let mut table = match file {
        Some(path) => read(path)?,
        None => Table::new(),
    };
    for assignment in set {
        assign(&mut table, assignment)?;
    }
    let from = file.map_or("--set".to_owned(), |path| path.display().to_string());
    T::deserialize(table).map_err(|error| anyhow!("{from}: {}", error.to_string().trim_end()))
}

fn read(path: &Path) -> anyhow::Result<Table> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.parse().with_context(|| format!("{} is not TOML", path.display()))
}

/// Sets `a.b = value` from `a.b=value`. The value is read as TOML, and as plain text if it is none.
fn assign(table: &mut Table, assignment: &str) -> anyhow::Result<()> {
    let Some((key, value)) = assignment.split_once('=') else {
        bail!("--set {assignment}: expected key=value, for example --set queue.limit=64");
    };
    let mut path: Vec<&str> = key.trim().split('.').collect();
    let last = path.pop().unwrap_or_default();
    let mut place = table;
    for part in path {
        let inner = place.entry(part).or_insert_with(|| Value::Table(Table::new()));
        place =
            inner.as_table_mut().with_context(|| format!("--set {key}: {part} is a value, not a table"))?;
    }
    place.insert(last.to_owned(), parse(value));
    Ok(())
}

fn parse(value: &str) -> Value {
    format!("value = {value}")
        .parse::<Table>()
        .ok()
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;

    #[derive(serde::Deserialize, Debug, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Config {
        name: String,
        queue: Queue,
        urls: Vec<String>,
    }
    #[derive(serde::Deserialize, Debug, PartialEq, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Queue {
        limit: u32,
    }
    impl Default for Config {
        fn default() -> Self {
            Config { name: "x".into(), queue: Queue { limit: 1 }, urls: vec![] }
        }
    }

    fn set(assignments: &[&str]) -> anyhow::Result<Config> {
        load(None, &assignments.iter().map(|s| s.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn assignments_reach_into_tables_and_keep_their_types() {
        let config = set(&["name=a=b", "queue.limit=7", r#"urls=["http://a:1"]"#]).unwrap();
        assert_eq!(
            config,
            Config { name: "a=b".into(), queue: Queue { limit: 7 }, urls: vec!["http://a:1".into()] }
        );
    }

    #[test]
    fn an_unknown_key_is_named() {
        for (assignment, named) in [("limit=3", "limit"), ("queue.max=3", "max"), ("name", "key=value")] {
            let error = format!("{:#}", set(&[assignment]).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_file_is_read_first_and_its_unknown_keys_are_named() {
        let file = env::temp_dir().join(format!("baton-settings-{}.toml", std::process::id()));
        fs::write(&file, "name = \"file\"\n[queue]\nlimit = 2\n").unwrap();
        let config: Config = load(Some(&file), &["queue.limit=3".to_owned()]).unwrap();
        assert_eq!((config.name.as_str(), config.queue.limit), ("file", 3));
        for (text, named) in [("[queue]\nlimits = 2\n", "limits"), ("name = ", "is not TOML")] {
            fs::write(&file, text).unwrap();
            let error = format!("{:#}", load::<Config>(Some(&file), &[]).unwrap_err());
            assert!(error.contains(named) && error.contains("baton-settings"), "{error}");
        }
        fs::remove_file(&file).unwrap();
        let error = format!("{:#}", load::<Config>(Some(&file), &[]).unwrap_err());
        assert!(error.contains("cannot read"), "{error}");
    }
}
