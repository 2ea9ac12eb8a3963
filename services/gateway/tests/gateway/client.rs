//! A plain HTTP/1.1 client that shows every byte: whole replies and live streams.

use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    fn parse(raw: &str) -> Self {
        let (head, body) = raw.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no reply, but {raw:?}"));
        let status = head[9..12].parse().unwrap();
        let head = head.to_ascii_lowercase();
        let body = if head.contains("transfer-encoding: chunked") { dechunk(body) } else { body.to_owned() };
        Reply { status, head, body }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")))
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {:?}", self.body))
    }

    /// Payloads of the SSE events, without `[DONE]`, which must be the last.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events: Vec<&str> =
            self.body.split("\n\n").filter_map(|frame| frame.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "in {}", self.body);
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    /// (status, param, code) of an error, whose four fields must be there.
    pub fn error(&self) -> (u16, String, String) {
        let error = &self.json()["error"];
        assert_eq!(error.as_object().map(|fields| fields.len()), Some(4), "{}", self.body);
        assert!(error["message"].is_string() && error["type"].is_string());
        let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
        (self.status, text(&error["param"]), text(&error["code"]))
    }
}

/// Of a whole body or of one still coming.
fn dechunk(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 || rest.len() < size {
            break;
        }
        out.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    out
}

pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Reply {
    request(address, "POST", path, "content-type: application/json\r\n", &body.to_string()).await
}

pub async fn get(address: SocketAddr, path: &str) -> Reply {
    request(address, "GET", path, "", "").await
}

pub async fn request(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Reply {
    let mut live = Live::send(address, method, path, headers, body).await;
    live.finish().await;
    live.reply()
}

/// For what is promised soon, on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A request whose reply is read as it comes. Dropping it closes the connection.
pub struct Live {
    stream: TcpStream,
    raw: Vec<u8>,
}

impl Live {
    pub async fn post(address: SocketAddr, path: &str, body: &Value) -> Self {
        Live::send(address, "POST", path, "content-type: application/json\r\n", &body.to_string()).await
    }

    pub async fn send(address: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> Self {
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
        );
        Live::raw(address, &(head + body)).await
    }

    pub async fn raw(address: SocketAddr, request: &str) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        Live { stream, raw: Vec::new() }
    }

    pub async fn more(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Reads until what has come contains `text`.
    pub async fn until(&mut self, text: &str) {
        self.until_after("", text).await;
    }

    /// The same, where only what follows the first `before` counts.
    pub async fn until_after(&mut self, before: &str, text: &str) {
        let found = |raw: &[u8]| {
            let raw = String::from_utf8_lossy(raw);
            raw.split_once(before).is_some_and(|(_, after)| after.contains(text))
        };
        let reading = async {
            while !found(&self.raw) {
                assert_ne!(self.stream.read_buf(&mut self.raw).await.unwrap(), 0, "the end without {text:?}");
            }
        };
        let found = tokio::time::timeout(PATIENCE, reading).await;
        assert!(found.is_ok(), "no {text:?} after {before:?} in {:?}", String::from_utf8_lossy(&self.raw));
    }

    pub async fn finish(&mut self) {
        self.finish_within(PATIENCE).await;
    }

    pub async fn finish_within(&mut self, patience: Duration) {
        let reading = async { while self.stream.read_buf(&mut self.raw).await.unwrap_or(0) > 0 {} };
        let finished = tokio::time::timeout(patience, reading).await;
        assert!(finished.is_ok(), "no whole reply within {patience:?}");
    }

    pub fn reply(&self) -> Reply {
        Reply::parse(std::str::from_utf8(&self.raw).unwrap())
    }

    /// Whether anything at all has come within this time.
    pub async fn quiet_for(&mut self, ms: u64) -> bool {
        tokio::time::timeout(Duration::from_millis(ms), self.stream.read_buf(&mut self.raw)).await.is_err()
    }
}
