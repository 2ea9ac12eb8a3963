//! Mutual TLS between services. Every connection shows a certificate on both sides, signed by the one authority that all
//! services know, and nothing is resumed: who could connect yesterday shows today's certificate. Files that change are taken
//! up for the connections that come; those that are open stay.
//!
//! Pods change their addresses, so a server is not known by the one it was dialled at: its certificate bears a name that all
//! services share (`server_name`). Who holds a certificate of the authority with that name is one of us; the authority should
//! sign nobody else.

use crate::{Contents, watched};
use proto::Dial;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    version::TLS13,
};
use serde::{Deserialize, Serialize};
use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
};
use telemetry::credentials::Metrics;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// As metrics have it.
const WHAT: &str = "tls";
const HTTP2: &[u8] = b"h2";

/// PEM files, read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The authority that signs the certificates of all services; several while one follows another.
    pub ca: PathBuf,
    /// This service's certificate, for clients and servers both, and whatever stands between it and the authority.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// The name that every service's certificate bears (subjectAltName).
    #[serde(default = "name")]
    pub server_name: String,
}

fn name() -> String {
    "baton".into()
}

/// Why a service cannot secure its connections.
#[derive(Debug, thiserror::Error)]
#[error("tls: {0}")]
pub struct Error(String);

/// This service's side of every connection. Clones share it.
#[derive(Clone)]
pub struct Tls {
    current: Arc<RwLock<Sides>>,
    name: ServerName<'static>,
    metrics: Metrics,
    _follows: Arc<AbortOnDropHandle<()>>,
}

#[derive(Clone)]
struct Sides {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// With the files as they are now. Must be called in a runtime, in which it follows their changes.
    pub fn open(config: &TlsConfig, metrics: Metrics) -> Result<Self, Error> {
        let name = ServerName::try_from(config.server_name.clone()).map_err(|_| {
            Error(format!("server_name {:?} is no DNS name, like \"baton\"", config.server_name))
        })?;
        let paths = vec![config.ca.clone(), config.cert.clone(), config.key.clone()];
        let known = watched::read(&paths).map_err(Error)?;
        let current = Arc::new(RwLock::new(sides(&known, &name).map_err(Error)?));
        metrics.watch(WHAT);
        let take = {
            let (current, name) = (current.clone(), name.clone());
            move |contents: &Contents| {
                let fresh = sides(contents, &name)?;
                *current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
                Ok(())
            }
        };
        let follows = tokio::spawn(watched::follow(WHAT, paths, known, metrics.clone(), take));
        Ok(Tls { current, name, metrics, _follows: Arc::new(AbortOnDropHandle::new(follows)) })
    }

    /// Opens connections that are secured.
    pub fn dial(&self) -> Dial {
        crate::dial::dial(self.clone())
    }

    /// Connections to `listener`, once they are secured.
    pub fn incoming(&self, listener: TcpListener) -> crate::Incoming {
        self.incoming_within(listener, crate::Patience::default())
    }

    pub fn incoming_within(&self, listener: TcpListener, patience: crate::Patience) -> crate::Incoming {
        crate::Incoming::new(listener, self.clone(), patience)
    }

    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.sides().server
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.sides().client
    }

    pub(crate) fn name(&self) -> ServerName<'static> {
        self.name.clone()
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn sides(&self) -> Sides {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Both sides, or why nobody could connect with these files.
fn sides(contents: &Contents, name: &ServerName<'static>) -> Result<Sides, String> {
    let [ca, cert, key] = &contents[..] else { return Err("three files are needed".into()) };
    let roots = Arc::new(roots(ca)?);
    let chain = certificates(cert).map_err(|problem| format!("cert: {problem}"))?;
    let key =
        PrivateKeyDer::from_pem_slice(key).map_err(|error| format!("key: no private key in PEM: {error}"))?;
    let provider = Arc::new(ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| format!("ca: {error}"))?;
    let clients: Arc<dyn ClientCertVerifier> = Arc::new(Named { signed: clients, name: name.clone() });
    check_own(&chain, &roots, name, &*clients, &provider)?;
    let unusable = |error: rustls::Error| format!("cert and key: {error}");
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(unusable)?;
    server.alpn_protocols = vec![HTTP2.to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(unusable)?;
    client.alpn_protocols = vec![HTTP2.to_vec()];
    client.resumption = Resumption::disabled();
    Ok(Sides { server: Arc::new(server), client: Arc::new(client) })
}

/// Takes a client's certificate if the authority has signed it and it bears the services' name: others may hold one of the same
/// authority.
#[derive(Debug)]
struct Named {
    signed: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for Named {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.signed.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        client: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.signed.verify_client_cert(client, between, now)?;
        verify_server_name(&ParsedCertificate::try_from(client)?, &self.name)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}

/// What the other services would say of this one's certificate, as server and as client: expired, of another authority,
/// without the name. Said here it is said once, and at the right place.
fn check_own(
    chain: &[CertificateDer<'static>],
    roots: &Arc<RootCertStore>,
    name: &ServerName<'_>,
    clients: &dyn ClientCertVerifier,
    provider: &Arc<CryptoProvider>,
) -> Result<(), String> {
    let (own, between) = chain.split_first().ok_or("cert: no certificate in it")?;
    let now = UnixTime::now();
    let servers = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone())
        .build()
        .map_err(|error| format!("ca: {error}"))?;
    servers
        .verify_server_cert(own, between, name, &[], now)
        .map_err(|error| format!("cert: other services would refuse this server: {error}"))?;
    clients
        .verify_client_cert(own, between, now)
        .map_err(|error| format!("cert: other services would refuse this client: {error}"))?;
    Ok(())
}

fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem).map_err(|problem| format!("ca: {problem}"))? {
        roots.add(certificate).map_err(|error| format!("ca: {error}"))?;
    }
    Ok(roots)
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err("no certificate in PEM".into()),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("not PEM: {error}")),
    }
}
