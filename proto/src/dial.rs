//! How a connection to a service is opened: over TCP, unless whoever starts a service says otherwise, as the
//! simulated cluster does. Knows no addresses and no settings of its own; both come with the endpoint.

use std::{fmt, sync::Arc};
use tonic::transport::{Channel, Endpoint};

/// Opens channels. A channel connects when it is first used, and again after a loss.
#[derive(Clone)]
pub struct Dial(Arc<dyn Fn(&Endpoint) -> Channel + Send + Sync>);

impl Dial {
    pub fn new(open: impl Fn(&Endpoint) -> Channel + Send + Sync + 'static) -> Self {
        Dial(Arc::new(open))
    }

    pub fn channel(&self, to: &Endpoint) -> Channel {
        (self.0)(to)
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
