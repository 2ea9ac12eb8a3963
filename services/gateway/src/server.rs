//! Listeners, start and stop.

use crate::api;
use crate::config::ms;
use crate::connections::{Settings, serve};
use crate::gateway::Gateway;
use crate::{Config, Error};
use axum::serve::{Listener, ListenerExt, TapIo};
use credentials::{Metrics, Tls};
use proto::Dial;
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use telemetry::spans::Identity;
use telemetry::{Registry, Spans};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

/// For answers to say that they were cut off.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// A gateway that has its ports and its model, and serves nobody yet.
pub struct Server<L = Tcp> {
    gateway: Arc<Gateway>,
    registry: Arc<Registry>,
    credentials: Metrics,
    public: L,
    admin: L,
    /// Set when running answers must end.
    cut: watch::Sender<bool>,
}

/// Serves until `shutdown`, after one line on stdout that says where.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    let server = Server::bind(config).await?;
    announce(server.http()?, server.admin()?);
    server.serve(shutdown).await
}

/// A port that sends small pieces at once.
pub type Tcp = TapIo<TcpListener, fn(&mut TcpStream)>;

impl Server {
    pub async fn bind(config: Config) -> Result<Self, Error> {
        let (public, admin) = (listen(config.listen).await?, listen(config.admin).await?);
        let credentials = Metrics::default();
        let tls = config.tls.as_ref().map(|tls| Tls::open(tls, credentials.clone())).transpose()?;
        let dial = tls.as_ref().map_or_else(Dial::default, Tls::dial);
        Server::with(config, &dial, credentials, public, admin)
    }

    /// Where the OpenAI API is.
    pub fn http(&self) -> Result<SocketAddr, Error> {
        Ok(self.public.local_addr()?)
    }

    pub fn admin(&self) -> Result<SocketAddr, Error> {
        Ok(self.admin.local_addr()?)
    }
}

impl<L: Listener<Addr: fmt::Debug>> Server<L> {
    /// On ports that are there already, with `dial` to reach routers.
    pub fn on(config: Config, dial: &Dial, public: L, admin: L) -> Result<Self, Error> {
        Server::with(config, dial, Metrics::default(), public, admin)
    }

    fn with(config: Config, dial: &Dial, credentials: Metrics, public: L, admin: L) -> Result<Self, Error> {
        let mut registry = Registry::default();
        credentials.register(&mut registry);
        let metrics = telemetry::gateway::Metrics::new(&mut registry);
        let spans = spans(&config, &mut registry)?;
        let (cut, closing) = watch::channel(false);
        let gateway = Arc::new(Gateway::new(config, dial, (metrics, spans), closing)?);
        Ok(Server { gateway, registry: Arc::new(registry), credentials, public, admin, cut })
    }

    /// Until `shutdown`; then takes no more requests, lets running answers end for `drain_ms`, cuts the rest. The admin port
    /// is there until then: who counts what this gateway does also counts what ends in the drain.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
        let Server { gateway, registry, credentials, public, admin, cut } = self;
        let settings = || Settings::new(&gateway.config);
        let (stop, stopping) = watch::channel(false);
        let public = serve(public, api::public(gateway.clone(), registry.clone()), settings(), stopping);
        let (close, closing) = watch::channel(false);
        let admin = serve(admin, api::admin(gateway.clone(), registry), settings(), closing);
        tokio::pin!(admin);
        tokio::select! {
            () = drained(&gateway, public, shutdown, (stop, cut)) => {}
            () = &mut admin => {}
            () = gateway.keep_looking() => {}
            () = gateway.keep_history() => {}
            () = follow_keys(&gateway, &credentials) => {}
        }
        close.send_replace(true);
        let _ = timeout(LAST_WORDS, admin).await;
        gateway.spans.flush().await;
        Ok(())
    }
}

/// Resolves when, after `shutdown`, all public connections have ended or been cut. `stop`: no more of them; `cut`: an end to
/// the answers that run.
async fn drained(
    gateway: &Gateway,
    public: impl Future<Output = ()> + Send,
    shutdown: impl Future<Output = ()> + Send,
    (stop, cut): (watch::Sender<bool>, watch::Sender<bool>),
) {
    tokio::pin!(public);
    tokio::select! {
        () = &mut public => return,
        () = shutdown => {}
    }
    gateway.drain();
    stop.send_replace(true);
    if timeout(ms(gateway.config.timeouts.drain_ms), &mut public).await.is_err() {
        cut.send_replace(true);
        let _ = timeout(LAST_WORDS, &mut public).await;
    }
}

fn spans(config: &Config, registry: &mut Registry) -> Result<Spans, Error> {
    let instance = telemetry::spans::instance("gateway");
    let identity = Identity { service: "gateway", instance: &instance, version: env!("CARGO_PKG_VERSION") };
    Spans::start(&config.traces, &identity, registry).map_err(Error::Config)
}

/// Never ends.
async fn follow_keys(gateway: &Gateway, metrics: &Metrics) {
    match &gateway.keys {
        Some(keys) => keys.follow(metrics).await,
        None => std::future::pending().await,
    }
}

async fn listen(address: SocketAddr) -> Result<Tcp, Error> {
    let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
    Ok(listener.tap_io(send_at_once))
}

fn send_at_once(stream: &mut TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "set_nodelay");
    }
}

/// The one line on stdout, for whoever started this.
fn announce(http: SocketAddr, admin: SocketAddr) {
    let http = format!("http://{http}");
    let admin = format!("http://{admin}");
    println!("{}", serde_json::json!({"listening": {"http": http, "admin": admin}}));
    tracing::info!(%http, %admin, "gateway listens");
}
