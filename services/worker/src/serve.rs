//! The life of the process: bind, load, serve, join; drain and leave.

use crate::{
    Config, Error, buffers,
    decode::DecodeService,
    guard, health, leave,
    load::{self, Loaded, OnStep},
    member::{self, Addresses},
    metrics::Metrics,
    pool,
    prefill::PrefillService,
    probe::{self, ReachService},
    shared::Shared,
};
use axum::serve::Listener;
use credentials::Tls;
use handoff::serve::HandoffServer;
use membership::Membership;
use proto::{Dial, decode_server::DecodeServer, prefill_server::PrefillServer, reach_server::ReachServer};
use std::{
    fmt,
    future::Future,
    io::{self, Write},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};
use telemetry::{Readiness, Registry, Spans, admin, phase, spans::Identity};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

/// Longest wait for connections to close once nothing runs on them.
const CLOSE: Duration = Duration::from_millis(500);

/// Runs a worker until `shutdown`, then drains it. Prints one line with its addresses to stdout once bound.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    config.check()?;
    buffers::keep();
    let credentials = credentials::Metrics::default();
    let tls = config.tls.as_ref().map(|tls| Tls::open(tls, credentials.clone())).transpose()?;
    let dial = tls.as_ref().map_or_else(Dial::default, Tls::dial);
    let membership = membership::connect_by(config.membership.clone(), dial.clone())?;
    let Listeners { grpc, admin, addresses } = Listeners::bind(&config).await?;
    addresses.announce();
    let place = Place { addresses, membership, dial, credentials };
    match tls {
        Some(tls) => serve(config, place, tls.incoming(grpc), admin, load::load, shutdown).await,
        None => serve(config, place, handoff::transport::incoming(grpc), admin, load::load, shutdown).await,
    }
}

/// Where a worker stands among others.
pub struct Place {
    /// Under which others reach it.
    pub addresses: Addresses,
    pub membership: Arc<dyn Membership>,
    /// How it reaches others.
    pub dial: Dial,
    /// What happens to what it shows others, and they show it.
    pub credentials: credentials::Metrics,
}

/// The same on ports that are there already, with the engine that `load` starts.
pub async fn serve<C, L, F>(
    config: Config,
    place: Place,
    incoming: impl Stream<Item = io::Result<C>> + Send + 'static,
    admin: L,
    load: impl FnOnce(Config, OnStep) -> F,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    L: Listener<Addr: fmt::Debug>,
    F: Future<Output = Result<Loaded, Error>>,
{
    let mut registry = Registry::default();
    let metrics = Metrics::new(config.role, config.handoff.transport, &mut registry);
    let id = telemetry::spans::instance(config.role.name());
    let service = Identity { service: config.role.name(), instance: &id, version: env!("CARGO_PKG_VERSION") };
    let spans = Spans::start(&config.traces, &service, &mut registry).map_err(Error::Traces)?;
    let (ready, readiness) = watch::channel(Readiness::not("loading the model"));
    let (current, pool) = watch::channel(None);
    let asked = CancellationToken::new();
    let Place { addresses, membership, dial, credentials } = place;
    credentials.register(&mut registry);
    let leaving = leave::router(&id, asked.clone());
    let changing = leaving.merge(phase::routes()).merge(probe::router(pool.clone()));
    let routes = pool::router(pool).merge(guard::guard(changing, config.admin_token_file.clone())?);
    let admin = Server::spawn(|stop| admin::serve(admin, registry, readiness, routes, stop));
    let shutdown = async {
        tokio::select! {
            () = shutdown => {}
            () = asked.cancelled() => {}
        }
    };
    tokio::pin!(shutdown);
    let on_step = {
        let metrics = metrics.clone();
        Box::new(move |step| metrics.step(step))
    };
    let Loaded { engine, identity, model } = tokio::select! {
        loaded = load(config.clone(), on_step) => loaded?,
        () = &mut shutdown => {
            admin.stop().await;
            return Ok(());
        }
    };
    let shared = Arc::new(Shared::new(id, config, dial, engine, identity, (metrics, spans))?);
    shared.metrics.loaded(&shared.load());
    current.send_replace(Some(shared.clone()));
    let server = Server::spawn(|stop| grpc(incoming, shared.clone(), stop));
    let worker = Worker { shared: shared.clone(), model, addresses, server, ready };
    let outcome = worker.live(&*membership, shutdown).await;
    admin.stop().await;
    shared.spans.flush().await;
    outcome
}

struct Listeners {
    grpc: TcpListener,
    admin: TcpListener,
    addresses: Addresses,
}

impl Listeners {
    async fn bind(config: &Config) -> Result<Self, Error> {
        let (grpc, grpc_at) = bind(config.listen).await?;
        let (admin, admin_at) = bind(config.admin).await?;
        let advertised = |advertise: &Option<String>, scheme: &str, at: SocketAddr| {
            advertise.clone().unwrap_or_else(|| format!("{scheme}://{at}"))
        };
        let addresses = Addresses {
            grpc: advertised(&config.advertise, config.scheme(), grpc_at),
            admin: advertised(&config.advertise_admin, "http", admin_at),
        };
        Ok(Listeners { grpc, admin, addresses })
    }
}

impl Addresses {
    fn announce(&self) {
        let Addresses { grpc, admin } = self;
        let line = serde_json::json!({ "listening": { "grpc": grpc, "admin": admin } });
        // Whoever started us may not listen.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

async fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let listen = |cause| Error::Listen { address, cause };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let at = listener.local_addr().map_err(listen)?;
    Ok((listener, at))
}

async fn grpc<C>(
    incoming: impl Stream<Item = io::Result<C>>,
    shared: Arc<Shared>,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    const MOST: usize = proto::MAX_MESSAGE_BYTES;
    let decode = DecodeServer::new(DecodeService(shared.clone())).max_decoding_message_size(MOST);
    let prefill = PrefillServer::new(PrefillService(shared.clone())).max_decoding_message_size(MOST);
    let handoff = HandoffServer::new(shared.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<DecodeServer<DecodeService>>().await;
    health.set_serving::<PrefillServer<PrefillService>>().await;
    health.set_serving::<HandoffServer<Shared>>().await;
    health.set_serving::<ReachServer<ReachService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .build_v1()
        .expect("the descriptors are compiled in");
    // Every role serves all three: what a role does not do it refuses by name.
    let server = handoff::transport::server()
        .add_service(health_service)
        .add_service(reflection)
        .add_service(decode)
        .add_service(prefill)
        .add_service(handoff)
        .add_service(ReachService::server(shared.clone()))
        .serve_with_incoming_shutdown(incoming, stop);
    tokio::select! {
        ended = server => ended,
        () = health::tell(shared, health) => Ok(()),
    }
}

/// A listener's task, and how to end it.
struct Server<E> {
    task: JoinHandle<Result<(), E>>,
    stop: oneshot::Sender<()>,
}

impl<E: std::fmt::Display + Send + 'static> Server<E> {
    fn spawn<F>(serve: impl FnOnce(Stopped) -> F) -> Self
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel();
        Server { task: tokio::spawn(serve(Box::pin(async { stopped.await.unwrap_or_default() }))), stop }
    }

    /// Resolves with the cause when the listener ends by itself.
    async fn ended(&mut self) -> String {
        match (&mut self.task).await {
            Ok(Ok(())) => "the listener closed".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(panic) => panic.to_string(),
        }
    }

    /// Waits a bounded time for connections to close.
    async fn stop(self) {
        drop(self.stop);
        // What `ended` has told is over.
        if self.task.is_finished() {
            return;
        }
        let abort = self.task.abort_handle();
        match tokio::time::timeout(CLOSE, self.task).await {
            Ok(Ok(Err(error))) => tracing::warn!(%error, "a listener ended badly"),
            Ok(_) => {}
            Err(_) => abort.abort(),
        }
    }
}

type Stopped = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// A worker with its model loaded.
struct Worker {
    shared: Arc<Shared>,
    model: String,
    addresses: Addresses,
    server: Server<tonic::transport::Error>,
    ready: watch::Sender<Readiness>,
}

impl Worker {
    async fn live(
        mut self,
        membership: &dyn Membership,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        let registration = membership.join(member::record(&shared, &self.addresses, &self.model));
        self.ready.send_replace(Readiness::not("joining the cluster"));
        let joined = async {
            registration.joined().await;
            tracing::info!(id = shared.id, model = self.model, "joined the cluster");
            self.ready.send_replace(Readiness::ready());
            std::future::pending::<()>().await;
        };
        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            cause = shared.engine.stopped() => Err(Error::Engine(cause)),
            cause = self.server.ended() => Err(Error::Serve(cause)),
            () = joined => Ok(()),
            () = member::tell_load(&registration, &shared) => Ok(()),
        };
        self.ready.send_replace(Readiness::not("leaving the cluster"));
        registration.update(|member| member.draining = true);
        tokio::select! {
            () = shared.drain() => {}
            () = member::tell_load(&registration, &shared) => {}
        }
        registration.leave().await;
        self.server.stop().await;
        outcome
    }
}
