//! Which source of membership a process uses, as it stands in its configuration file.

use crate::{Error, EtcdTls, Membership, etcd::Etcd, registry_client::RegistryClient};
use proto::Dial;
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};
use tonic::transport::Endpoint;

/// Exactly one of `etcd` and `registry` is set; [`connect`] checks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MembershipConfig {
    /// Every endpoint of the etcd cluster: any one of them may die.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub etcd: Vec<String>,
    /// For endpoints on https.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<EtcdTls>,
    /// gRPC address of the router that serves the registry, when there is no etcd.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// Name of this cluster among others in the same etcd: members are `/<prefix>/members/<id>`.
    pub prefix: String,
    /// etcd: a member silent for so long is gone (whole seconds, rounded up). A registry has its own.
    pub lease_ms: u64,
}

impl Default for MembershipConfig {
    fn default() -> Self {
        Self { etcd: Vec::new(), tls: None, registry: None, prefix: "baton".into(), lease_ms: 5_000 }
    }
}

impl MembershipConfig {
    pub fn etcd(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { etcd: endpoints.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    pub fn registry(url: impl Into<String>) -> Self {
        Self { registry: Some(url.into()), ..Self::default() }
    }

    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// What [`connect`] refuses, without connecting: for checking a configuration early.
    pub fn check(&self) -> Result<(), Error> {
        match (&self.etcd[..], &self.registry) {
            ([], None) => return Err(Error::Source("neither is set")),
            ([_, ..], Some(_)) => return Err(Error::Source("both are set")),
            _ => {}
        }
        for url in &self.etcd {
            match &self.tls {
                Some(_) => endpoint(url, "https://")?,
                None => endpoint(url, "http://")?,
            };
        }
        if let Some(url) = &self.registry {
            endpoint(url, if url.starts_with("https://") { "https://" } else { "http://" })?;
        }
        self.check_tls()?;
        if !(1_000..=300_000).contains(&self.lease_ms) {
            return Err(Error::Lease(self.lease_ms));
        }
        if self.prefix.is_empty() || self.prefix.contains('/') {
            return Err(Error::Prefix(self.prefix.clone()));
        }
        Ok(())
    }

    fn check_tls(&self) -> Result<(), Error> {
        match &self.tls {
            Some(_) if self.etcd.is_empty() => {
                Err(Error::Tls("is set, but it is for etcd, and `etcd` is not"))
            }
            Some(tls) => tls.check(),
            None => Ok(()),
        }
    }
}

/// A client of the configured source. Connects lazily and for ever: an absent source is not an error.
pub fn connect(config: MembershipConfig) -> Result<Arc<dyn Membership>, Error> {
    connect_by(config, Dial::default())
}

/// The same, with a registry reached by `dial`; etcd has a way of its own.
pub fn connect_by(config: MembershipConfig, dial: Dial) -> Result<Arc<dyn Membership>, Error> {
    config.check()?;
    match &config.registry {
        Some(url) => registry(url, dial),
        None => {
            config.tls.as_ref().map(EtcdTls::read).transpose()?;
            Ok(Arc::new(Etcd::new(&config)))
        }
    }
}

/// A client of the registry at `url`, reached by `dial`.
pub fn registry(url: &str, dial: Dial) -> Result<Arc<dyn Membership>, Error> {
    let wrong = |reason| Error::Registry { url: url.into(), reason };
    Ok(Arc::new(RegistryClient::new(dial.endpoint(url).map_err(wrong)?, dial)))
}

fn endpoint(url: &str, scheme: &'static str) -> Result<Endpoint, Error> {
    let wrong = |reason: String| Error::Url { url: url.into(), scheme, reason };
    if !url.starts_with(scheme) {
        return Err(wrong(format!("no {scheme} in front")));
    }
    Endpoint::from_shared(url.to_owned()).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> String {
        match serde_json::from_str::<MembershipConfig>(json) {
            Ok(config) => config.check().map_or_else(|error| error.to_string(), |()| "ok".into()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn exactly_one_source_with_urls_and_a_sane_lease() {
        assert_eq!(check(r#"{"etcd": ["http://a:2379", "http://b:2379"]}"#), "ok");
        assert_eq!(check(r#"{"registry": "http://router:9000"}"#), "ok");
        for (json, part) in [
            ("{}", "neither is set"),
            (r#"{"etcd": ["http://a:1"], "registry": "http://b:1"}"#, "both are set"),
            (r#"{"etcd": ["a:2379"]}"#, "`a:2379` is not an http:// URL"),
            (r#"{"etcd": ["https://a:2379"]}"#, "for https:// set tls"),
            (r#"{"etcd": ["http://a:2379"], "tls": {"ca": "c"}}"#, "is not an https:// URL"),
            (r#"{"etcd": ["https://a:1"], "tls": {"ca": "c", "cert": "d"}}"#, "needs both"),
            (r#"{"registry": "http://b:1", "tls": {"ca": "c"}}"#, "it is for etcd"),
            (r#"{"registry": "http://b:1", "lease_ms": 5}"#, "lease_ms = 5 is out of range"),
            (r#"{"etcd": ["http://a:1"], "prefix": "a/b"}"#, "prefix `a/b`"),
            (r#"{"registri": "http://b:1"}"#, "unknown field `registri`"),
        ] {
            assert!(check(json).contains(part), "{json}: {}", check(json));
        }
    }
}
