//! Why a worker does not start, or ends.

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("configuration: `{key}` {what}; {fix}")]
    Config { key: &'static str, what: &'static str, fix: &'static str },
    #[error("there is no backend `{0}`; there are: {known}", known = crate::BACKENDS.join(", "))]
    Backend(String),
    #[error("configuration: {0}")]
    Membership(#[from] membership::Error),
    #[error("cannot listen on {address}: {cause}; choose another port, or 0 for a free one")]
    Listen { address: std::net::SocketAddr, cause: std::io::Error },
    #[error("cannot load the model: {0}")]
    Model(#[from] model::Error),
    #[error("`handoff.transport`: {0}")]
    Transport(handoff::Error),
    #[error("configuration: {0}")]
    Traces(String),
    #[error("cannot load the model: {0}")]
    Files(std::io::Error),
    #[error(transparent)]
    Tls(#[from] credentials::Error),
    #[error("`admin_token_file`: {0}")]
    AdminToken(String),
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    #[error("the engine stopped: {0}; the worker cannot go on and must be started again")]
    Engine(String),
    #[error("the gRPC port failed: {0}")]
    Serve(String),
    #[error("the hand-off cannot be measured: {0}")]
    Measure(String),
}
