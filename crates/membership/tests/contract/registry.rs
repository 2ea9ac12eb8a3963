//! The registry as a source: a router's gRPC server in a runtime of its own, so that it can die.

use crate::suite::{MARGIN, Source, ids, joined, member, until};
use membership::{Membership, MembershipConfig, RegistryServer, connect};
use proto::{JoinMessage, Keepalive, Member, join_message::Message, registry_client::RegistryClient};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpSocket, runtime::Runtime, sync::mpsc, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Status, transport::Server};

pub struct Registry {
    address: SocketAddr,
    /// Bound, never listening: nobody else gets the port while the server is away.
    _port: TcpSocket,
    server: RegistryServer,
    runtime: Option<Runtime>,
}

impl Registry {
    pub fn start() -> Self {
        let port = bound(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        let mut registry = Self {
            address: port.local_addr().unwrap(),
            _port: port,
            server: RegistryServer::new(Self::LEASE),
            runtime: None,
        };
        registry.serve();
        registry
    }

    fn serve(&mut self) {
        let listener = bound(self.address).listen(128).unwrap().into_std().unwrap();
        let runtime = Runtime::new().unwrap();
        let service = self.server.service();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let incoming = TcpListenerStream::new(listener);
            Server::builder().add_service(service).serve_with_incoming(incoming).await
        });
        self.runtime = Some(runtime);
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    async fn raw(&self) -> RegistryClient<tonic::transport::Channel> {
        RegistryClient::connect(self.url()).await.unwrap()
    }
}

impl Source for Registry {
    const LEASE: Duration = Duration::from_secs(3);

    fn client(&self) -> Arc<dyn Membership> {
        connect(MembershipConfig::registry(self.url())).unwrap()
    }

    fn stop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    fn start_again(&mut self) {
        self.server = RegistryServer::new(Self::LEASE);
        self.serve();
    }
}

/// Shares its port with those that are bound in the same way, as long as but one of them listens.
fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(address).unwrap();
    socket
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn message(message: Message) -> JoinMessage {
    JoinMessage { message: Some(message) }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_router_itself_sees_and_joins_what_it_serves() {
    let registry = Registry::start();
    let (inside, outside) = (registry.server.clone(), registry.client());
    let far = outside.join(member("far"));
    let near = inside.join(member("near"));
    joined(&far).await;
    joined(&near).await;
    near.update(|member| member.draining = true);
    for mut view in [inside.watch(), outside.watch()] {
        until(&mut view, MARGIN, "both there", |view| {
            ids(view) == ["far", "near"] && view.members[1].draining && view.connected
        })
        .await;
    }
    near.leave().await;
    until(&mut outside.watch(), MARGIN, "left", |view| ids(view) == ["far"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_stays_open_but_silent_loses_its_lease() {
    let registry = Registry::start();
    let (sender, receiver) = mpsc::channel(1);
    sender.send(message(Message::Join(member("silent")))).await.unwrap();
    let replies = registry.raw().await.join(ReceiverStream::new(receiver)).await;
    let mut replies = replies.unwrap().into_inner();
    let reply = replies.message().await.unwrap().unwrap();
    assert_eq!(u128::from(reply.lease_ms), Registry::LEASE.as_millis());
    let mut view = registry.server.watch();
    assert_eq!(ids(&view.borrow_and_update()), ["silent"]);
    until(&mut view, Registry::LEASE + MARGIN, "expired", |view| view.members.is_empty()).await;
    let end = replies.message().await.unwrap_err();
    assert_eq!(end.code(), Code::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_taken_over_is_told() {
    let registry = Registry::start();
    let (sender, receiver) = mpsc::channel(2);
    sender.send(message(Message::Join(member("same")))).await.unwrap();
    let replies = registry.raw().await.join(ReceiverStream::new(receiver)).await;
    let mut replies = replies.unwrap().into_inner();
    replies.message().await.unwrap().unwrap();
    let later = registry.client().join(member("same"));
    joined(&later).await;
    sender.send(message(Message::Keepalive(Keepalive {}))).await.unwrap();
    let end = replies.message().await.unwrap_err();
    assert_eq!(end.code(), Code::Aborted, "{end}");
}

async fn refusal(registry: &Registry, first: JoinMessage) -> Status {
    let (sender, receiver) = mpsc::channel(1);
    sender.send(first).await.unwrap();
    let replies = registry.raw().await.join(ReceiverStream::new(receiver)).await;
    replies.unwrap().into_inner().message().await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_must_begin_with_a_proper_join() {
    let registry = Registry::start();
    for first in [
        JoinMessage { message: None },
        message(Message::Update(member("x"))),
        message(Message::Join(Member::default())),
        message(Message::Join(member(&"x".repeat(257)))),
    ] {
        let status = refusal(&registry, first).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    assert!(registry.server.watch().borrow().members.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_ends_all_streams_so_that_a_server_can_stop() {
    let registry = RegistryServer::new(Registry::LEASE);
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let closing = registry.clone();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server =
        tokio::spawn(Server::builder().add_service(registry.service()).serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            async move {
                let _ = stopped.await;
                closing.close();
            },
        ));
    let client = connect(MembershipConfig::registry(url)).unwrap();
    let registration = client.join(member("one"));
    joined(&registration).await;
    let mut view = client.watch();
    until(&mut view, MARGIN, "there", |view| ids(view) == ["one"]).await;
    stop.send(()).unwrap();
    timeout(MARGIN, server).await.expect("the server stops").unwrap().unwrap();
    until(&mut view, MARGIN, "disconnected", |view| !view.connected).await;
    assert_eq!(ids(&view.borrow()), ["one"]);
}
