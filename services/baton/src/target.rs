//! Where a gateway is, and the key that it asks for: what all commands that talk to one have in common.

use crate::http::Client;
use anyhow::Context;
use clap::Args;
use credentials::TokenFile;
use std::{fs, path::PathBuf};

/// Name of the variable with the key: an argument would show in the list of processes.
const KEY: &str = "BATON_API_KEY";

#[derive(Args, Clone)]
pub struct Target {
    /// Address of the gateway
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// File with the API key, if the gateway asks for one [default: the variable BATON_API_KEY]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// What workers that have one ask for before they are changed, besides any gateway.
#[derive(Args, Clone)]
pub struct AdminToken {
    /// File with the admin token, if the workers ask for one (`admin_token_file`)
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl AdminToken {
    pub fn read(&self) -> Result<Option<String>, String> {
        self.token_file.clone().map(|path| TokenFile::open(path)?.read()).transpose()
    }
}

impl Target {
    pub fn client(&self) -> anyhow::Result<Client> {
        let key = match &self.key_file {
            Some(path) => {
                let text =
                    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
                Some(text.trim().to_owned())
            }
            None => std::env::var(KEY).ok().filter(|key| !key.is_empty()),
        };
        Ok(Client::new(&self.url)?.with_bearer(key))
    }
}
