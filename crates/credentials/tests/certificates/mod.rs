//! Certificates for tests: authorities, and what they issue.

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    date_time_ymd,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

pub struct Authority {
    certificate: Certificate,
    key: KeyPair,
}

/// A certificate and its key, in PEM.
pub struct Issued {
    pub cert: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Authority { certificate: params.self_signed(&key).unwrap(), key }
    }

    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// For servers and clients that bear `name`.
    pub fn issue(&self, name: &str) -> Issued {
        self.sign(params(name, &[name]))
    }

    /// The same, of long ago.
    pub fn issue_expired(&self, name: &str) -> Issued {
        let mut params = params(name, &[name]);
        params.not_after = date_time_ymd(2020, 1, 1);
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Issued {
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.certificate, &self.key).unwrap();
        Issued { cert: cert.pem(), key: key.serialize_pem() }
    }
}

/// The files of one service, which change as a mounted Secret does: all at once.
pub struct Files {
    dir: PathBuf,
    version: u32,
}

impl Files {
    pub fn new(dir: &Path, ca: &str, issued: &Issued) -> Self {
        let mut files = Files { dir: dir.to_owned(), version: 0 };
        fs::create_dir_all(dir).unwrap();
        files.replace(ca, issued);
        files
    }

    pub fn replace(&mut self, ca: &str, issued: &Issued) {
        self.version += 1;
        let version = format!("version-{}", self.version);
        let inside = self.dir.join(&version);
        fs::create_dir(&inside).unwrap();
        for (name, text) in [("ca.crt", ca), ("tls.crt", &issued.cert), ("tls.key", &issued.key)] {
            fs::write(inside.join(name), text).unwrap();
        }
        let fresh = self.dir.join("fresh");
        std::os::unix::fs::symlink(version, &fresh).unwrap();
        fs::rename(fresh, self.dir.join("now")).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join("now").join(name)
    }
}

fn params(name: &str, names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
