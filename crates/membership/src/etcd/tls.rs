//! TLS to etcd, from files. They are read for every new connection, so that a renewed certificate is taken up; the first reading is at
//! start, so that a wrong path is an error there.

use crate::Error;
use etcd_client::{Certificate, Identity, TlsOptions};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// PEM files. `cert` and `key` name this process to etcd and are needed if it asks for a client certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdTls {
    /// The authority that signed the servers' certificates.
    pub ca: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

impl EtcdTls {
    pub(crate) fn check(&self) -> Result<(), Error> {
        match (&self.cert, &self.key) {
            (Some(_), None) => {
                Err(Error::Tls("cert is set, but key is not; a client certificate needs both"))
            }
            (None, Some(_)) => {
                Err(Error::Tls("key is set, but cert is not; a client certificate needs both"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn read(&self) -> Result<TlsOptions, Error> {
        let options = TlsOptions::new().ca_certificate(Certificate::from_pem(pem(&self.ca)?));
        Ok(match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => options.identity(Identity::from_pem(pem(cert)?, pem(key)?)),
            _ => options,
        })
    }
}

fn pem(path: &Path) -> Result<Vec<u8>, Error> {
    let wrong = |reason: String| Error::Pem { path: path.to_owned(), reason };
    let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    match text.windows(10).any(|part| part == b"-----BEGIN") {
        true => Ok(text),
        false => Err(wrong("no -----BEGIN line in it".into())),
    }
}
