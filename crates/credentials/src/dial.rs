//! The client's side: a connection is made over TCP and secured before anything is said on it.

use crate::Tls;
use hyper_util::rt::TokioIo;
use proto::Dial;
use std::io;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::codegen::http::Uri;

/// The endpoint bounds the time of connecting, securing included.
pub fn dial(tls: Tls) -> Dial {
    Dial::secured(move |endpoint| {
        let tls = tls.clone();
        endpoint.connect_with_connector_lazy(tower::service_fn(move |to| connect(tls.clone(), to)))
    })
}

async fn connect(tls: Tls, to: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = to.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let tcp = TcpStream::connect((host, to.port_u16().unwrap_or(443))).await?;
    tcp.set_nodelay(true)?;
    let secured = TlsConnector::from(tls.client()).connect(tls.name(), tcp).await?;
    Ok(TokioIo::new(secured))
}
