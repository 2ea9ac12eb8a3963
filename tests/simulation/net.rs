//! The network of a simulated cluster: hosts by name, ports, and the ways between them, each of which can be
//! slow or blocked in one direction. Connections behave as TCP's do: in order, delayed, without loss, until
//! one end is gone. Every byte that arrives goes into the [`Journal`].

use crate::{
    journal::Journal,
    nature::Chance,
    pipe::{Found, Pipe},
};
use hyper_util::rt::TokioIo;
use proto::Dial;
use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{Notify, mpsc},
    time::{Instant, Sleep, sleep, sleep_until},
};
use tonic::transport::Uri;

/// Connections that nobody has accepted yet.
const BACKLOG: usize = 256;

#[derive(Clone)]
pub struct Net {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    pub journal: Journal,
}

struct State {
    chance: Chance,
    ports: BTreeMap<String, Port>,
    /// From, to: what way is blocked.
    blocked: BTreeSet<(String, String)>,
    /// From, to: how much slower.
    slow: BTreeMap<(String, String), Duration>,
    /// Neither send nor receive.
    paused: BTreeSet<String>,
    dead: BTreeSet<String>,
    pipes: Vec<Way>,
}

struct Port {
    host: String,
    accepted: mpsc::Sender<Conn>,
}

/// As services take it.
pub struct Listener(pub mpsc::Receiver<Conn>);

impl axum::serve::Listener for Listener {
    type Io = Conn;
    type Addr = ();

    async fn accept(&mut self) -> (Conn, ()) {
        match self.0.recv().await {
            Some(conn) => (conn, ()),
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A pipe between two hosts, as long as one of its ends is there.
struct Way {
    from: String,
    to: String,
    pipe: Weak<Mutex<Pipe>>,
}

impl Net {
    pub fn new(seed: u64, journal: Journal) -> Self {
        let state = State {
            chance: Chance::new(seed, "network"),
            ports: BTreeMap::new(),
            blocked: BTreeSet::new(),
            slow: BTreeMap::new(),
            paused: BTreeSet::new(),
            dead: BTreeSet::new(),
            pipes: Vec::new(),
        };
        Net { state: Arc::new(Mutex::new(state)), changed: Arc::default(), journal }
    }

    /// The port `address` (host:port as URLs name it) on `host`, in place of an earlier one.
    pub fn listen(&self, host: &str, address: &str) -> mpsc::Receiver<Conn> {
        let (accepted, incoming) = mpsc::channel(BACKLOG);
        self.state().ports.insert(address.to_owned(), Port { host: host.to_owned(), accepted });
        incoming
    }

    /// A connection from `host`; waits while the way is blocked.
    pub async fn dial(&self, host: &str, address: &str) -> io::Result<Conn> {
        loop {
            let changed = self.changed.notified();
            let opening = self.state().connect(self, host, address)?;
            let Some((delay, accepted, far, near)) = opening else {
                changed.await;
                continue;
            };
            sleep(delay).await;
            let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
            return accepted.try_send(far).map(|()| near).map_err(refused);
        }
    }

    /// How a service on `host` reaches others.
    pub fn dialing(&self, host: &str) -> Dial {
        let (net, host) = (self.clone(), host.to_owned());
        Dial::new(move |endpoint| {
            let (net, host) = (net.clone(), host.clone());
            endpoint.connect_with_connector_lazy(tower::service_fn(move |to: Uri| {
                let (net, host) = (net.clone(), host.clone());
                async move {
                    let address = to.authority().map_or("", |at| at.as_str());
                    net.dial(&host, address).await.map(TokioIo::new)
                }
            }))
        })
    }

    pub fn block(&self, from: &str, to: &str, blocked: bool) {
        let way = (from.to_owned(), to.to_owned());
        self.change(|state| match blocked {
            true => drop(state.blocked.insert(way)),
            false => drop(state.blocked.remove(&way)),
        });
    }

    pub fn slow(&self, from: &str, to: &str, delay: Duration) {
        self.change(|state| _ = state.slow.insert((from.to_owned(), to.to_owned()), delay));
    }

    pub fn pause(&self, host: &str, paused: bool) {
        self.change(|state| match paused {
            true => drop(state.paused.insert(host.to_owned())),
            false => drop(state.paused.remove(host)),
        });
    }

    /// No byte from or to `host` any more, and its ports are closed; other hosts see its connections break.
    pub fn kill(&self, host: &str) {
        self.change(|state| {
            state.dead.insert(host.to_owned());
            state.ports.retain(|_, port| port.host != host);
            state.break_ways(|way| way.from == host || way.to == host);
        });
    }

    /// All connections between two hosts break.
    pub fn cut(&self, one: &str, other: &str) {
        let between =
            |way: &Way| (way.from == one && way.to == other) || (way.from == other && way.to == one);
        self.change(|state| state.break_ways(between));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        state.pipes.retain(|way| way.pipe.strong_count() > 0);
        let pipes: Vec<_> = state.pipes.iter().filter_map(|way| way.pipe.upgrade()).collect();
        drop(state);
        pipes.iter().for_each(|pipe| lock(pipe).wake());
        self.changed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// How long it takes, where the far end goes, and both ends.
type Opening = (Duration, mpsc::Sender<Conn>, Conn, Conn);

impl State {
    fn connect(&mut self, net: &Net, host: &str, address: &str) -> io::Result<Option<Opening>> {
        if self.dead.contains(host) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let Some(port) = self.ports.get(address) else { return Err(io::ErrorKind::ConnectionRefused.into()) };
        let (to, accepted) = (port.host.clone(), port.accepted.clone());
        // A paused host's kernel still accepts.
        if self.is_blocked(host, &to) || self.is_blocked(&to, host) {
            return Ok(None);
        }
        let (there, back) = (self.way(host, &to), self.way(&to, host));
        let near = Conn::new(net, host, &to, back.clone(), there.clone());
        let far = Conn::new(net, &to, host, there, back);
        Ok(Some((self.delay(host, &to), accepted, far, near)))
    }

    fn way(&mut self, from: &str, to: &str) -> Arc<Mutex<Pipe>> {
        let pipe = Arc::default();
        self.pipes.push(Way { from: from.to_owned(), to: to.to_owned(), pipe: Arc::downgrade(&pipe) });
        pipe
    }

    fn delay(&mut self, from: &str, to: &str) -> Duration {
        let jitter = Duration::from_millis(*self.chance.of(&[0, 0, 0, 0, 1, 1, 1, 2, 2, 5]));
        jitter + self.slow.get(&(from.to_owned(), to.to_owned())).copied().unwrap_or_default()
    }

    fn is_blocked(&self, from: &str, to: &str) -> bool {
        self.blocked.contains(&(from.to_owned(), to.to_owned()))
    }

    fn stands_still(&self, from: &str, to: &str) -> bool {
        self.paused.contains(from) || self.paused.contains(to) || self.is_blocked(from, to)
    }

    fn break_ways(&mut self, which: impl Fn(&Way) -> bool) {
        for way in self.pipes.iter().filter(|way| which(way)) {
            way.pipe.upgrade().inspect(|pipe| lock(pipe).break_off());
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One end of a connection.
pub struct Conn {
    net: Net,
    here: String,
    there: String,
    incoming: Arc<Mutex<Pipe>>,
    outgoing: Arc<Mutex<Pipe>>,
    arrival: Option<Pin<Box<Sleep>>>,
}

impl Conn {
    fn new(
        net: &Net,
        here: &str,
        there: &str,
        incoming: Arc<Mutex<Pipe>>,
        outgoing: Arc<Mutex<Pipe>>,
    ) -> Self {
        let (here, there) = (here.to_owned(), there.to_owned());
        Conn { net: net.clone(), here, there, incoming, outgoing, arrival: None }
    }

    fn find(&self, context: &mut Context<'_>, most: usize) -> io::Result<Found> {
        let blocked = self.net.state().stands_still(&self.there, &self.here);
        lock(&self.incoming).receive(context, most, blocked)
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.find(context, buffer.remaining())? {
                Found::Bytes(bytes) => {
                    self.net.journal.arrived(&self.there, &self.here, &bytes);
                    buffer.put_slice(&bytes);
                    return Poll::Ready(Ok(()));
                }
                Found::End => return Poll::Ready(Ok(())),
                Found::Later(None) => return Poll::Pending,
                Found::Later(Some(arrives)) => {
                    let arrival = self.arrival.insert(Box::pin(sleep_until(arrives)));
                    ready!(arrival.as_mut().poll(context));
                }
            }
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (delay, deaf) = {
            let mut state = self.net.state();
            (state.delay(&self.here, &self.there), state.stands_still(&self.there, &self.here))
        };
        lock(&self.outgoing).send(context, bytes, Instant::now() + delay, deaf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.outgoing).finish();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        lock(&self.outgoing).finish();
        lock(&self.incoming).abandon();
    }
}

impl tonic::transport::server::Connected for Conn {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
