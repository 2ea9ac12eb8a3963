//! The server's side: connections appear once they are secured. They are secured beside each other and each within its time,
//! and where there are too many the oldest is given up, if it has had a fair time. So many that say nothing hold up none that
//! comes, and many honest ones at once wait their turn; a flood of silent ones, more in a fair time than there is room for, slows us.

use crate::Tls;
use futures::Stream;
use std::{
    collections::VecDeque,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::task::AbortOnDropHandle;

/// How long a handshake may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub longest: Duration,
    /// Where others wait. One of us is done in a few round trips, even on a busy machine.
    pub fair: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience { longest: Duration::from_secs(5), fair: Duration::from_secs(2) }
    }
}

/// Handshakes at the same time; further connections wait in the listener's queue.
const HANDSHAKES: usize = 256;
/// After an error of the listener, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Ends never by itself; dropping it closes the port.
pub struct Incoming {
    secured: mpsc::Receiver<TlsStream<TcpStream>>,
    _accepts: AbortOnDropHandle<()>,
}

impl Incoming {
    pub(crate) fn new(listener: TcpListener, tls: Tls, patience: Patience) -> Self {
        let (sender, secured) = mpsc::channel(1);
        let accepts = tokio::spawn(accept(listener, tls, patience, sender));
        Incoming { secured, _accepts: AbortOnDropHandle::new(accepts) }
    }
}

impl Stream for Incoming {
    type Item = io::Result<TlsStream<TcpStream>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.secured.poll_recv(context).map(|secured| secured.map(Ok))
    }
}

async fn accept(
    listener: TcpListener,
    tls: Tls,
    patience: Patience,
    secured: mpsc::Sender<TlsStream<TcpStream>>,
) {
    let mut pending = Pending::default();
    loop {
        pending.make_room(patience.fair).await;
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(PAUSE).await;
                continue;
            }
        };
        let (tls, secured, given_up) = (tls.clone(), secured.clone(), pending.begin());
        tokio::spawn(async move {
            match unless(given_up, patience.fair, secure(&tls, tcp, patience.longest)).await {
                Ok(stream) => drop(secured.send(stream).await),
                Err(error) => refused(&tls, from, &error),
            }
        });
    }
}

/// Handshakes under way and when each began, the oldest first. Each ends when its sender is dropped.
#[derive(Default)]
struct Pending(VecDeque<(Instant, oneshot::Sender<()>)>);

impl Pending {
    /// Waits for one to be done or to have had its time.
    async fn make_room(&mut self, fair: Duration) {
        self.0.retain(|(_, handshake)| !handshake.is_closed());
        if self.0.len() < HANDSHAKES {
            return;
        }
        if let Some((began, mut oldest)) = self.0.pop_front() {
            let _ = timeout_at(began + fair, oldest.closed()).await;
        }
    }

    /// One more: it ends when what this gives resolves.
    fn begin(&mut self) -> oneshot::Receiver<()> {
        let (handshake, given_up) = oneshot::channel();
        self.0.push_back((Instant::now(), handshake));
        given_up
    }
}

async fn unless<T>(
    given_up: oneshot::Receiver<()>,
    fair: Duration,
    handshake: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    tokio::select! {
        biased;
        outcome = handshake => outcome,
        _ = given_up => Err(io::Error::other(format!("not done after {fair:?}, and others wait"))),
    }
}

async fn secure(tls: &Tls, tcp: TcpStream, longest: Duration) -> io::Result<TlsStream<TcpStream>> {
    tcp.set_nodelay(true)?;
    let handshake = TlsAcceptor::from(tls.server()).accept(tcp);
    timeout(longest, handshake).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn refused(tls: &Tls, from: SocketAddr, error: &io::Error) {
    tls.metrics().connection_refused();
    tracing::warn!(%from, %error, "a connection that could not show who it is was refused");
}
