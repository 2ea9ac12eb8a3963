//! How a connection to a service is opened: over TCP, unless whoever starts a service says otherwise, as one whose
//! connections are secured does, and the simulated cluster. Knows no addresses and no settings of its own; both come with
//! the endpoint.

use std::{fmt, sync::Arc};
use tonic::{
    codegen::http::Uri,
    transport::{Channel, Endpoint},
};

/// Of what a stream of events that nobody reads leaves in the reader's memory: some two hundred of them.
const STREAM_WINDOW: u32 = 64 << 10;
/// The most that HTTP/2 allows, so that streams that nobody reads never use up the connection for the others. It is credit
/// and takes no memory: what may lie here is bounded by the streams and the window of each.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Opens channels. A channel connects when it is first used, and again after a loss.
#[derive(Clone)]
pub struct Dial {
    open: Arc<dyn Fn(&Endpoint) -> Channel + Send + Sync>,
    secured: bool,
}

impl Dial {
    pub fn new(open: impl Fn(&Endpoint) -> Channel + Send + Sync + 'static) -> Self {
        Dial { open: Arc::new(open), secured: false }
    }

    /// `open` secures connections itself, those to every endpoint.
    pub fn secured(open: impl Fn(&Endpoint) -> Channel + Send + Sync + 'static) -> Self {
        Dial { secured: true, ..Dial::new(open) }
    }

    /// What an address must begin with.
    pub fn scheme(&self) -> &'static str {
        if self.secured { "https" } else { "http" }
    }

    /// Of an address, like http://host:port, or https://host:port where connections are secured. Nothing is secured, or left
    /// unsecured, against the word of the address.
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, String> {
        let uri: Uri = address.parse().map_err(|error| format!("{error}"))?;
        match uri.scheme_str() {
            Some(scheme) if scheme == self.scheme() => {}
            _ if self.secured => {
                return Err("the scheme is not https, but tls is set here; all services need it".into());
            }
            Some("https") => return Err("the scheme is not http; for https set tls here too".into()),
            _ => return Err("the scheme is not http".into()),
        }
        let host = uri.authority().ok_or("no host in it")?;
        // To tonic it is plain: what secures it is this dial, and not tonic's own TLS.
        let endpoint = Endpoint::from_shared(format!("http://{host}")).map_err(|error| error.to_string())?;
        Ok(endpoint.origin(uri))
    }

    /// The same for calls that are answered by streams of events, as those of routers and workers are; KV blocks are none.
    pub fn events(&self, address: &str) -> Result<Endpoint, String> {
        let endpoint = self.endpoint(address)?;
        Ok(endpoint
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .tcp_nodelay(true))
    }

    pub fn channel(&self, to: &Endpoint) -> Channel {
        (self.open)(to)
    }
}

/// Over TCP.
impl Default for Dial {
    fn default() -> Self {
        Dial::new(Endpoint::connect_lazy)
    }
}

impl fmt::Debug for Dial {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Dial")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_says_what_the_dial_does() {
        let (plain, secured) = (Dial::default(), Dial::secured(Endpoint::connect_lazy));
        assert!(plain.endpoint("http://a:1").is_ok());
        assert_eq!(secured.endpoint("https://a:1").unwrap().uri(), "http://a:1/");
        for (dial, address, part) in [
            (&plain, "https://a:1", "for https set tls"),
            (&secured, "http://a:1", "is not https"),
            (&plain, "a:1", "is not http"),
            (&plain, "ftp://a:1", "is not http"),
            (&plain, "not a url", "invalid"),
        ] {
            let error = dial.endpoint(address).unwrap_err();
            assert!(error.contains(part), "{address}: {error}");
        }
    }
}
