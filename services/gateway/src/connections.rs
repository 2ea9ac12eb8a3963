//! Connections: how many there may be, how long the head of a request may take and how large it may be, and an end in good
//! order. Who sends a head byte by byte, or opens connections for their own sake, holds nothing but his own.

use crate::api::reply;
use crate::config::{Config, ms};
use crate::stalls::Stalls;
use crate::unread::{Unread, Watched};
use axum::Router;
use axum::body::Body;
use axum::serve::Listener;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use openai::{Code, Error};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::timeout;
use tower::ServiceExt;

/// A head that exceeds a limit by less than this gets an error that says so; a larger one, hyper's bare 431.
const SLACK: usize = 4;
/// hyper wants no less for its buffer.
const LEAST_BUFFER: usize = 64 << 10;
/// For a client to read why its connection is closed.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// For a client that still sends a body to read why it was refused: many send all of it before they read anything.
const STILL_SENDING: Duration = Duration::from_secs(5);
/// Connections beyond the limit that are told so at the same time; further ones are closed without a word.
const REFUSALS: usize = 64;

pub struct Settings {
    http: http1::Builder,
    connections: usize,
    header: Duration,
    stalled: Duration,
    /// Of a refused body that are taken after the refusal.
    unread_bytes: u64,
    retry_after: Duration,
}

impl Settings {
    pub fn new(config: &Config) -> Self {
        let (limits, header) = (&config.limits, ms(config.timeouts.header_ms));
        let bytes = limits.header_bytes.saturating_mul(SLACK);
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(header)
            .max_headers(limits.headers.saturating_mul(SLACK))
            .max_header_size(bytes)
            .max_buf_size(bytes.max(LEAST_BUFFER));
        let retry_after = ms(config.timeouts.retry_after_ms);
        let stalled = ms(config.timeouts.stalled_client_ms);
        let unread_bytes = limits.body_bytes as u64;
        Settings { http, connections: limits.connections, header, stalled, unread_bytes, retry_after }
    }

    fn too_many(&self) -> Error {
        let message = format!("all {} connections are in use; try again shortly", self.connections);
        Error::new(Code::Overloaded, message).retry_after(self.retry_after)
    }

    fn too_slow(&self) -> Error {
        let message = format!("the header was not complete after {} s", self.header.as_secs_f32());
        Error::new(Code::BodyTimeout, message)
    }
}

/// Until `stopping`, and then until the last connection has ended; idle ones end at once.
pub async fn serve<L: Listener<Addr: fmt::Debug>>(
    mut listener: L,
    app: Router,
    settings: Settings,
    mut stopping: watch::Receiver<bool>,
) {
    let settings = Arc::new(settings);
    let places = Arc::new(Semaphore::new(settings.connections.min(Semaphore::MAX_PERMITS)));
    let refusals = Arc::new(Semaphore::new(REFUSALS));
    // Each connection has a receiver: when none is left, all have ended.
    let open = watch::Sender::new(());
    loop {
        let io = tokio::select! {
            (io, _) = listener.accept() => io,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match (places.clone().try_acquire_owned(), refusals.clone().try_acquire_owned()) {
            (Ok(place), _) => {
                let (app, settings, open) = (app.clone(), settings.clone(), open.subscribe());
                let connection =
                    Connection { app, settings, stopping: stopping.clone(), _place: place, _open: open };
                tokio::spawn(connection.serve(io));
            }
            (Err(_), Ok(place)) => drop(tokio::spawn(refuse(io, settings.too_many(), place))),
            (Err(_), Err(_)) => {}
        }
    }
    drop(listener);
    open.closed().await;
}

struct Connection {
    app: Router,
    settings: Arc<Settings>,
    stopping: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
    _open: watch::Receiver<()>,
}

impl Connection {
    async fn serve<I: AsyncRead + AsyncWrite + Send + Unpin + 'static>(mut self, io: I) {
        let (app, unread) = (self.app.clone(), Unread::default());
        let bodies = unread.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let request = request.map(|body| Body::new(Watched::new(body, bodies.clone())));
            Box::pin(app.clone().oneshot(request))
        });
        let io = Stalls::new(io, self.settings.stalled);
        let mut connection = self.settings.http.serve_connection(TokioIo::new(io), service);
        let mut asked_to_end = false;
        let ended = loop {
            tokio::select! {
                ended = poll_fn(|context| connection.poll_without_shutdown(context)) => break ended,
                _ = self.stopping.wait_for(|stop| *stop), if !asked_to_end => {
                    asked_to_end = true;
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                }
            }
        };
        let parts = connection.into_parts();
        let (mut io, begun) = (parts.io.into_inner(), !parts.read_buf.is_empty());
        let patience = if asked_to_end { LAST_WORDS } else { STILL_SENDING };
        match ended {
            // An idle connection is closed without a word: the client may be about to send its next request.
            Err(error) if error.is_timeout() && begun => say(&mut io, &self.settings.too_slow()).await,
            Err(error) => tracing::debug!(%error, "a connection ended"),
            Ok(()) if unread.any() => drop(timeout(patience, end(&mut io, self.settings.unread_bytes)).await),
            Ok(()) => drop(timeout(LAST_WORDS, io.shutdown()).await),
        }
    }
}

async fn refuse<I: AsyncRead + AsyncWrite + Unpin>(mut io: I, error: Error, _place: OwnedSemaphorePermit) {
    say(&mut io, &error).await;
}

/// Says why, and waits a little for the client to have read it.
async fn say<I: AsyncRead + AsyncWrite + Unpin>(io: &mut I, error: &Error) {
    let said = async {
        io.write_all(&reply::last_words(error)).await?;
        end(io, u64::MAX).await
    };
    let _ = timeout(LAST_WORDS, said).await;
}

/// Takes what the client still sends until it has read to the end: what is closed with bytes unread takes the answer with it.
async fn end<I: AsyncRead + AsyncWrite + Unpin>(io: &mut I, most: u64) -> io::Result<u64> {
    io.shutdown().await?;
    copy(&mut io.take(most), &mut sink()).await
}
