//! A small HTTP client for talking to a gateway: plain HTTP, whole answers or streams.

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::Incoming,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use hyper_util::{
    client::legacy::{Client as Pool, connect::HttpConnector},
    rt::TokioExecutor,
};
use std::time::Duration;

/// Shares its connections; clone freely.
#[derive(Clone)]
pub struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    base: String,
    /// Sent with every request: an API key, or an admin token.
    bearer: Option<String>,
}

impl Client {
    /// `base`: http://host:port.
    pub fn new(base: &str) -> anyhow::Result<Self> {
        let base = base.trim_end_matches('/').to_owned();
        let uri: Uri =
            base.parse().with_context(|| format!("{base} is not a URL like http://127.0.0.1:8000"))?;
        if uri.scheme_str() != Some("http") || uri.authority().is_none() {
            bail!("{base} is not a URL like http://127.0.0.1:8000");
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        Ok(Client { pool: Pool::builder(TokioExecutor::new()).build(connector), base, bearer: None })
    }

    pub fn with_bearer(self, bearer: Option<String>) -> Self {
        Client { bearer, ..self }
    }

    pub async fn get(&self, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.open(Method::GET, path, Bytes::new()).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }

    /// The answer, body unread.
    pub async fn open(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        self.open_with(method, path, body, &[]).await
    }

    pub async fn open_with(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Response<Incoming>> {
        let url = format!("{}{path}", self.base);
        let mut request =
            Request::builder().method(method).uri(&url).header(CONTENT_TYPE, "application/json");
        if let Some(bearer) = &self.bearer {
            request = request.header(AUTHORIZATION, format!("Bearer {bearer}"));
        }
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = request.body(Full::new(body))?;
        self.pool.request(request).await.with_context(|| format!("no answer from {url}"))
    }
}
