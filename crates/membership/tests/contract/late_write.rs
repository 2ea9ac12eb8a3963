//! A write that its sender has given up may still arrive. Here it arrives late for certain: behind a
//! proxy that holds the request back until later ones have been written through another endpoint.

use crate::{
    etcd::client_of,
    etcd_cluster::EtcdCluster,
    suite::{MARGIN, joined, member, set_running, until},
};
use membership::{Membership, Registration, View};
use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

/// By which a member's record is told from other traffic.
const RECORD: &[u8] = b"http://one:9000";
/// For the rest of a write, of which the record has come. Shorter than any call's time-out: what comes after it is lost, above
/// all the cancellation, which etcd would heed.
const REST: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Forward,
    Hold,
    Release,
}

/// How far the write has come that is held back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Write {
    Awaited,
    Held,
    Delivered,
}

struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    write: watch::Sender<Write>,
    forwarded: Arc<AtomicU64>,
}

impl Proxy {
    async fn before(target: String) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap(),
            mode: watch::Sender::new(Mode::Forward),
            write: watch::Sender::new(Write::Awaited),
            forwarded: Arc::default(),
        };
        let (mode, forwarded) = (proxy.mode.subscribe(), proxy.forwarded.clone());
        let write = proxy.write.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (mut far_read, far) = connect(&target).await.into_split();
                let (near, mut near_write) = near.into_split();
                tokio::spawn(pass(near, far, mode.clone(), write.clone(), forwarded.clone()));
                tokio::spawn(async move { copy(&mut far_read, &mut near_write).await });
            }
        });
        proxy
    }

    async fn until(&self, write: Write) {
        let mut here = self.write.subscribe();
        let came = timeout(MARGIN, here.wait_for(|here| *here == write)).await.is_ok();
        assert!(came, "the write through the proxy is not {write:?}, but {:?}", *self.write.borrow());
    }
}

async fn connect(target: &str) -> TcpStream {
    TcpStream::connect(target.trim_start_matches("http://")).await.unwrap()
}

async fn pass(
    mut near: OwnedReadHalf,
    mut far: OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
    write: watch::Sender<Write>,
    forwarded: Arc<AtomicU64>,
) {
    forward(&mut near, &mut far, &mut mode, &forwarded).await;
    let Some(held) = hold(&mut near).await else { return };
    write.send_replace(Write::Held);
    let _ = mode.wait_for(|mode| *mode == Mode::Release).await;
    far.write_all(&held).await.unwrap();
    write.send_replace(Write::Delivered);
    std::future::pending::<()>().await;
}

async fn forward(
    near: &mut OwnedReadHalf,
    far: &mut OwnedWriteHalf,
    mode: &mut watch::Receiver<Mode>,
    forwarded: &AtomicU64,
) {
    let mut chunk = vec![0; 64 << 10];
    while *mode.borrow() == Mode::Forward {
        tokio::select! {
            _ = mode.changed() => break,
            read = near.read(&mut chunk) => {
                let Ok(length @ 1..) = read else { return };
                far.write_all(&chunk[..length]).await.unwrap();
                forwarded.fetch_add(length as u64, Relaxed);
            }
        }
    }
}

/// What comes up to a whole write; `None` from a connection that ends without one.
async fn hold(near: &mut OwnedReadHalf) -> Option<Vec<u8>> {
    let mut held = Vec::new();
    while !held.windows(RECORD.len()).any(|part| part == RECORD) {
        near.read_buf(&mut held).await.ok().filter(|length| *length > 0)?;
    }
    let until = Instant::now() + REST;
    while let Ok(Ok(1..)) = timeout_at(until, near.read_buf(&mut held)).await {}
    Some(held)
}

/// Endpoints are tried in random order: joins until a client has begun with the proxy.
async fn join_through(proxy: &Proxy, direct: &str) -> (Arc<dyn Membership>, Registration) {
    loop {
        let client = client_of(vec![format!("http://{}", proxy.address), direct.into()]);
        let registration = client.join(member("one"));
        joined(&registration).await;
        if proxy.forwarded.load(Relaxed) > 0 {
            return (client, registration);
        }
        registration.leave().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_write_never_undoes_a_later_one() {
    let cluster = EtcdCluster::start(1);
    let direct = cluster.endpoints().remove(0);
    let proxy = Proxy::before(direct.clone()).await;
    let observer = client_of(vec![direct.clone()]);
    let mut view = observer.watch();
    let (_client, registration) = join_through(&proxy, &direct).await;
    let shows = |running| {
        move |view: &View| {
            let load = view.members.first().and_then(|member| member.load);
            load.is_some_and(|load| load.running == running)
        }
    };

    proxy.mode.send_replace(Mode::Hold);
    set_running(&registration, 1);
    proxy.until(Write::Held).await;
    until(&mut view, MARGIN, "written by the other endpoint", shows(1)).await;
    set_running(&registration, 2);
    until(&mut view, MARGIN, "written over", shows(2)).await;
    proxy.mode.send_replace(Mode::Release);
    proxy.until(Write::Delivered).await;
    // Not even for the moment that it would take to notice and repair.
    let undone = view.wait_for(|view| !shows(2)(view));
    let undone = timeout(Duration::from_secs(1), undone).await;
    assert!(undone.is_err(), "{undone:?}");
}
