//! Starting and stopping: listeners, the registry or the etcd client, the tasks that follow the membership,
//! and a drain with a bound.

use crate::{
    Config, Error, Shared,
    admission::Admission,
    channels::{self, Channels},
    cluster::{self, Cluster},
    config::ms,
    metrics::Metrics,
    policy::Credits,
    probe,
    service::Service,
};
use axum::serve::Listener;
use credentials::Tls;
use futures::Stream;
use membership::{Membership, MembershipConfig, RegistryServer, View};
use proto::{Dial, router_server::RouterServer};
use std::{
    collections::HashSet,
    fmt,
    future::Future,
    io::{self, Write},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use telemetry::{Registry, Spans, admin, admin::Readiness, spans::Identity};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{oneshot, watch},
    time::{Instant, sleep, timeout},
};
use tonic::transport::{
    Server,
    server::{Connected, Router as Services, TcpIncoming},
};

/// How often gauges and readiness are brought up to date when the membership does not change.
const OBSERVE: Duration = Duration::from_millis(250);
/// For what comes here, which is read at once whole: a stream that lies unread on the connection's window is not among it.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;
/// Longest wait for connections to close once nothing runs any more, or may no longer.
const CLOSE: Duration = Duration::from_millis(if cfg!(test) { 5000 } else { 500 });
/// Streams of one connection besides requests: registry, status, health, reflection.
const OTHER_STREAMS: usize = 256;

/// Serves until `shutdown` resolves; then running requests may go on for `drain_ms`.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
    let router = Router::new(config)?;
    let (grpc, admin) = (listen(router.config.listen).await?, listen(router.config.admin).await?);
    announce(&grpc, &admin, router.dial.scheme())?;
    match router.tls.clone() {
        Some(tls) => router.serve(tls.incoming(grpc), admin, shutdown).await,
        None => router.serve(TcpIncoming::from(grpc).with_nodelay(Some(true)), admin, shutdown).await,
    }
}

/// A router that has no ports yet.
pub struct Router {
    config: Config,
    source: Source,
    dial: Dial,
    tls: Option<Tls>,
    credentials: credentials::Metrics,
}

impl Router {
    /// With the membership that the configuration names, reaching workers over TCP, secured if it says so.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.check().map_err(Error::Config)?;
        let credentials = credentials::Metrics::default();
        let tls = config.tls.as_ref().map(|tls| Tls::open(tls, credentials.clone())).transpose()?;
        let dial = tls.as_ref().map_or_else(Dial::default, Tls::dial);
        Ok(Router { source: Source::new(&config)?, config, dial, tls, credentials })
    }

    /// With this membership, whatever the configuration names.
    pub fn with_members(self, members: Arc<dyn Membership>) -> Self {
        Router { source: Source::Outside(members), ..self }
    }

    /// Reaching workers by `dial`.
    pub fn with_dial(self, dial: Dial) -> Self {
        Router { dial, ..self }
    }

    /// On ports that are there already.
    pub async fn serve<C, L>(
        self,
        incoming: impl Stream<Item = io::Result<C>> + Send,
        admin: L,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), Error>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        L: Listener<Addr: fmt::Debug>,
    {
        let Router { config, source, dial, tls: _tls, credentials } = self;
        let mut registry = Registry::default();
        credentials.register(&mut registry);
        let shared = Arc::new(shared(config, dial, &mut registry)?);
        let (readiness, ready) = watch::channel(Readiness::not("starting"));
        let (stop, stopping) = oneshot::channel::<()>();
        let stopping = async { drop(stopping.await) };
        let server = grpc_server(&shared, &source).await?.serve_with_incoming_shutdown(incoming, stopping);
        tokio::pin!(server);
        let served = tokio::select! {
            () = drained(&shared, &source, shutdown) => Ok(()),
            result = &mut server => {
                shared.spans.flush().await;
                return Ok(result?);
            }
            result = admin::serve(admin, registry, ready, axum::Router::new(), std::future::pending()) => Ok(result?),
            () = follow(&shared, source.watch(), readiness) => Ok(()),
            () = shared.admission.run() => Ok(()),
            () = probe::run(&shared) => Ok(()),
        };
        drop(stop);
        // The last events of requests that have just ended are still on their way.
        let _ = timeout(CLOSE, server).await;
        shared.spans.flush().await;
        served
    }
}

fn shared(config: Config, dial: Dial, registry: &mut Registry) -> Result<Shared, Error> {
    let instance = telemetry::spans::instance("router");
    let identity = Identity { service: "router", instance: &instance, version: env!("CARGO_PKG_VERSION") };
    let spans = Spans::start(&config.traces, &identity, registry).map_err(Error::Config)?;
    let cluster = Cluster::new(cluster::Settings {
        credits: Credits { tokens: config.prefill.tokens, requests: config.prefill.requests },
        refusal: ms(config.members.refusal_ms),
        prefix_blocks: config.members.prefix_blocks,
    });
    let settings = channels::Settings {
        per_address: config.members.connections,
        connect: ms(config.liveness.connect_ms),
        silence: ms(config.liveness.silence_ms),
    };
    let channels = Channels::new(settings, dial);
    let admission = Admission::new(cluster.clone(), &config);
    let (metrics, draining) = (Metrics::new(registry), AtomicBool::new(false));
    Ok(Shared {
        config,
        cluster,
        admission,
        channels,
        metrics,
        spans,
        draining,
        lives: watch::Sender::new(()),
    })
}

/// Where the membership comes from.
enum Source {
    /// Served here.
    Registry(RegistryServer),
    Outside(Arc<dyn Membership>),
}

impl Source {
    fn new(config: &Config) -> Result<Self, Error> {
        if config.etcd.is_empty() {
            return Ok(Source::Registry(RegistryServer::new(ms(config.lease_ms))));
        }
        let (etcd, tls, prefix) = (config.etcd.clone(), config.etcd_tls.clone(), config.prefix.clone());
        let config = MembershipConfig { etcd, tls, prefix, lease_ms: config.lease_ms, registry: None };
        Ok(Source::Outside(membership::connect(config)?))
    }

    fn watch(&self) -> watch::Receiver<View> {
        match self {
            Source::Registry(registry) => registry.watch(),
            Source::Outside(members) => members.watch(),
        }
    }

    fn close(&self) {
        if let Source::Registry(registry) = self {
            registry.close();
        }
    }
}

async fn grpc_server(shared: &Arc<Shared>, source: &Source) -> Result<Services, Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<RouterServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .build_v1()?;
    let service = RouterServer::new(Service { shared: shared.clone() })
        .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
    let streams = shared.config.running + shared.config.queue.limit + OTHER_STREAMS;
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(u32::try_from(streams).unwrap_or(u32::MAX))
        .http2_keepalive_interval(Some(ms(shared.config.liveness.silence_ms)))
        .tcp_nodelay(true)
        .add_service(service)
        .add_service(health)
        .add_service(reflection);
    Ok(match source {
        Source::Registry(registry) => server.add_service(registry.service()),
        Source::Outside(_) => server,
    })
}

/// Takes over each view, and keeps readiness and gauges current.
async fn follow(shared: &Shared, mut views: watch::Receiver<View>, readiness: watch::Sender<Readiness>) {
    let mut source_lives = true;
    loop {
        let view = views.borrow_and_update().clone();
        let addresses: HashSet<&str> = view.members.iter().map(|member| member.address.as_str()).collect();
        shared.channels.retain(&addresses);
        shared.cluster.update(&view);
        loop {
            observe(shared, &readiness);
            tokio::select! {
                changed = views.changed(), if source_lives => {
                    source_lives = changed.is_ok();
                    break;
                }
                () = sleep(OBSERVE) => {}
            }
        }
    }
}

fn observe(shared: &Shared, readiness: &watch::Sender<Readiness>) {
    shared.metrics.observe(shared);
    let now = match shared.cluster.readiness() {
        _ if shared.draining.load(Ordering::Relaxed) => Readiness::not("stopping"),
        Ok(()) => Readiness::ready(),
        Err(reason) => Readiness::not(reason),
    };
    readiness.send_if_modified(|before| {
        let changed = *before != now;
        *before = now;
        changed
    });
}

/// Resolves when, after `shutdown`, nothing runs any more or the time to drain is over.
async fn drained(shared: &Shared, source: &Source, shutdown: impl Future<Output = ()> + Send) {
    shutdown.await;
    shared.draining.store(true, Ordering::Relaxed);
    let deadline = Instant::now() + ms(shared.config.drain_ms);
    while shared.lives() && Instant::now() < deadline {
        sleep(Duration::from_millis(20)).await;
    }
    source.close();
}

async fn listen(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })
}

/// The one line on stdout: where we listen, as ports may have been 0.
fn announce(grpc: &TcpListener, admin: &TcpListener, scheme: &str) -> Result<(), Error> {
    let (grpc, admin) = (grpc.local_addr()?, admin.local_addr()?);
    let (grpc, admin) = (format!("{scheme}://{grpc}"), format!("http://{admin}"));
    let listening = serde_json::json!({"listening": {"grpc": grpc, "admin": admin}});
    // Whoever started us may not listen.
    let _ = writeln!(std::io::stdout(), "{listening}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fakes::{self, World};
    use membership::connect;
    use proto::{Role, StatusRequest, generate_event::Event, router_client::RouterClient};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
        task::JoinHandle,
    };

    async fn free_address() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    async fn get(admin: SocketAddr, path: &str) -> String {
        let Ok(mut stream) = TcpStream::connect(admin).await else { return String::new() };
        let request = format!("GET {path} HTTP/1.1\r\nhost: router\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    async fn until(what: &str, admin: SocketAddr, path: &str, part: &str) {
        let seen = async {
            while !get(admin, path).await.contains(part) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(5), seen).await.unwrap_or_else(|_| panic!("never {what}"));
    }

    struct Started {
        listen: SocketAddr,
        admin: SocketAddr,
        stop: oneshot::Sender<()>,
        router: JoinHandle<Result<(), Error>>,
    }

    async fn start() -> Started {
        loop {
            let (listen, admin) = (free_address().await, free_address().await);
            let (stop, stopped) = oneshot::channel::<()>();
            let config = Config { listen, admin, ..fakes::config() };
            let router = tokio::spawn(run(config, async { drop(stopped.await) }));
            // Somebody else may have taken the address meanwhile.
            while !router.is_finished() {
                if get(admin, "/health").await.starts_with("HTTP/1.1 200") {
                    return Started { listen, admin, stop, router };
                }
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    #[tokio::test]
    async fn members_join_a_request_is_answered_and_all_of_it_stops() {
        let Started { listen, admin, stop, router } = start().await;
        until("says that no worker has joined", admin, "/ready", "no worker has joined").await;

        let members = connect(MembershipConfig::registry(format!("http://{listen}"))).unwrap();
        let world = Arc::new(World::default());
        let _prefill = members.join(world.worker("p", Role::Prefill).await);
        until("says that decode is missing", admin, "/ready", "no decode worker").await;
        let _decode = members.join(world.worker("d", Role::Decode).await);
        until("ready", admin, "/ready", "HTTP/1.1 200").await;

        let mut client = RouterClient::connect(format!("http://{listen}")).await.unwrap();
        let mut events = client.generate(fakes::request(10, 5)).await.unwrap().into_inner();
        let mut last = None;
        while let Some(event) = events.message().await.unwrap() {
            last = event.event;
        }
        assert!(matches!(last, Some(Event::Finished(_))), "{last:?}");
        let status = client.status(StatusRequest {}).await.unwrap().into_inner();
        assert_eq!((status.members.len(), status.queue_limit), (2, 1024));
        until("counts", admin, "/metrics", "baton_router_placements_total{outcome=\"placed\"} 1").await;
        until("counts", admin, "/metrics", "baton_members{role=\"decode\",state=\"ready\"} 1").await;

        stop.send(()).unwrap();
        timeout(Duration::from_secs(15), router).await.expect("stops in time").unwrap().unwrap();
    }

    /// A gateway that reads slowly has events outstanding when its request has ended and the router stops.
    #[tokio::test]
    async fn the_last_events_get_out() {
        let Started { listen, admin, stop, router } = start().await;
        let members = connect(MembershipConfig::registry(format!("http://{listen}"))).unwrap();
        let world = Arc::new(World::default());
        let _prefill = members.join(world.worker("p", Role::Prefill).await);
        let _decode = members.join(world.worker("d", Role::Decode).await);
        until("ready", admin, "/ready", "HTTP/1.1 200").await;

        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{listen}")).unwrap();
        let channel = endpoint.initial_stream_window_size(64).connect().await.unwrap();
        let mut client = RouterClient::new(channel);
        let mut events = client.generate(fakes::request(10, 20)).await.unwrap().into_inner();
        until("places it", admin, "/metrics", "baton_router_placements_total{outcome=\"placed\"} 1").await;
        until("has it ended", admin, "/metrics", "baton_router_running 0").await;
        sleep(Duration::from_millis(300)).await;
        stop.send(()).unwrap();
        sleep(Duration::from_millis(100)).await;
        let (mut tokens, mut last) = (0, None);
        while let Some(event) = events.message().await.expect("the stream ends in good order") {
            tokens += u32::from(matches!(event.event, Some(Event::Token(_))));
            last = event.event;
        }
        assert!(tokens == 20 && matches!(last, Some(Event::Finished(_))), "{tokens} tokens, {last:?}");
        timeout(Duration::from_secs(15), router).await.expect("stops in time").unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let listen = taken.local_addr().unwrap();
        let error = run(Config { listen, ..fakes::config() }, std::future::pending()).await.unwrap_err();
        assert!(error.to_string().contains(&listen.to_string()), "{error}");
    }
}
