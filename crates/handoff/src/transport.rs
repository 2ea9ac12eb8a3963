//! The gRPC transport: windows, frames, message size, keep-alive, for servers and for channels to them.
//!
//! A stream window of 4 MiB with frames of 1 MiB reached the rate of raw loopback TCP (2.2 GB/s) where the
//! default 64 KiB reached 0.4; larger windows made it slower again (tonic 0.14, two processes, one stream).

use crate::Error;
use std::time::Duration;
use tokio::net::TcpListener;
use tonic::transport::{Channel, Server, server::TcpIncoming};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const FRAME: u32 = 1 << 20;
/// Calls on one connection: each open request of a router is one. hyper's default of 200 would make
/// further ones wait in silence.
const STREAMS: u32 = 16_384;
const CONNECT: Duration = Duration::from_secs(5);
/// Pings find a peer whose machine has gone; a process that hangs is found by heartbeats.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// A server that can receive blocks.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_concurrent_streams(Some(STREAMS))
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_TIMEOUT))
}

/// What `server` accepts. Connections that come from a listener of our own know nothing of the server's settings, and
/// without this one every small answer waits for the acknowledgement of the one before, up to 40 ms.
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// A channel to the worker at `address` (http://host:port, or https:// where `dial` secures connections). Connects on first use, and again after a loss.
pub fn channel(dial: &proto::Dial, address: &str) -> Result<Channel, Error> {
    let endpoint =
        dial.endpoint(address).map_err(|cause| Error::Address { address: address.to_owned(), cause })?;
    let endpoint = endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .tcp_nodelay(true)
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(dial.channel(&endpoint))
}
