//! The server's side: connections appear once they are secured. They are secured beside each other and each within its time,
//! so that one which says nothing holds up none.

use crate::Tls;
use futures::Stream;
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::task::AbortOnDropHandle;

/// For one handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
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
    pub(crate) fn new(listener: TcpListener, tls: Tls) -> Self {
        let (sender, secured) = mpsc::channel(1);
        let accepts = tokio::spawn(accept(listener, tls, sender));
        Incoming { secured, _accepts: AbortOnDropHandle::new(accepts) }
    }
}

impl Stream for Incoming {
    type Item = io::Result<TlsStream<TcpStream>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.secured.poll_recv(context).map(|secured| secured.map(Ok))
    }
}

async fn accept(listener: TcpListener, tls: Tls, secured: mpsc::Sender<TlsStream<TcpStream>>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let (tcp, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(PAUSE).await;
                continue;
            }
        };
        let (tls, secured) = (tls.clone(), secured.clone());
        tokio::spawn(async move {
            let outcome = secure(&tls, tcp).await;
            drop(place);
            match outcome {
                Ok(stream) => drop(secured.send(stream).await),
                Err(error) => refused(&tls, from, &error),
            }
        });
    }
}

async fn secure(tls: &Tls, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    tcp.set_nodelay(true)?;
    let handshake = TlsAcceptor::from(tls.server()).accept(tcp);
    timeout(HANDSHAKE, handshake).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

fn refused(tls: &Tls, from: SocketAddr, error: &io::Error) {
    tls.metrics().connection_refused();
    tracing::warn!(%from, %error, "a connection that could not show who it is was refused");
}
