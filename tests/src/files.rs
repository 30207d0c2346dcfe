//! A tiny HTTP server for droplets, with the failures of a real one; and a tiny client.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What is served under a path.
#[derive(Debug, Clone)]
pub enum Body {
    /// 200 with these bytes.
    Bytes(Vec<u8>),
    /// 200 with these bytes, in a hundred pieces over this time.
    Slow(Vec<u8>, Duration),
    /// This status and nothing else.
    Status(u16),
    /// 200 and zeros without an end.
    Endless,
    /// Accepts and says nothing.
    Silent,
}

/// A file server in the namespace that it was started in.
#[derive(Debug, Clone)]
pub struct Files {
    address: SocketAddr,
    served: Arc<Mutex<Served>>,
}

#[derive(Debug, Default)]
struct Served {
    bodies: HashMap<String, Body>,
    requests: HashMap<String, u32>,
}

impl Files {
    /// Starts to serve on 127.0.0.1; ends with the runtime.
    pub async fn serve() -> Self {
        Self::serve_at("127.0.0.1").await
    }

    /// [`Files::serve`] on another address.
    pub async fn serve_at(address: &str) -> Self {
        let listener = TcpListener::bind((address, 0)).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let served = Arc::new(Mutex::new(Served::default()));
        let files = Self {
            address,
            served: Arc::clone(&served),
        };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that leaves is no failure of ours.
                tokio::spawn(answer(stream, Arc::clone(&served)));
            }
        });
        files
    }

    /// Puts `body` under `/name` and gives its URL.
    #[must_use]
    pub fn put(&self, name: &str, body: Body) -> String {
        let path = format!("/{name}");
        self.served
            .lock()
            .unwrap()
            .bodies
            .insert(path.clone(), body);
        format!("http://{}{path}", self.address)
    }

    /// How often `/name` was asked for.
    #[must_use]
    pub fn requests(&self, name: &str) -> u32 {
        self.served
            .lock()
            .unwrap()
            .requests
            .get(&format!("/{name}"))
            .copied()
            .unwrap_or(0)
    }
}

async fn answer(mut stream: TcpStream, served: Arc<Mutex<Served>>) -> std::io::Result<()> {
    let request = read_until(&mut stream, b"\r\n\r\n").await?;
    let request = String::from_utf8_lossy(&request);
    let path = request.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let body = {
        let mut served = served.lock().unwrap();
        *served.requests.entry(path.clone()).or_default() += 1;
        served
            .bodies
            .get(&path)
            .cloned()
            .unwrap_or(Body::Status(404))
    };
    let head = |length: usize| {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    match body {
        Body::Bytes(bytes) => {
            stream.write_all(head(bytes.len()).as_bytes()).await?;
            stream.write_all(&bytes).await?;
        }
        Body::Slow(bytes, time) => {
            stream.write_all(head(bytes.len()).as_bytes()).await?;
            for piece in bytes.chunks(bytes.len().div_ceil(100).max(1)) {
                stream.write_all(piece).await?;
                tokio::time::sleep(time / 100).await;
            }
        }
        Body::Status(status) => {
            let head =
                format!("HTTP/1.1 {status} So\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
        }
        Body::Endless => {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                .await?;
            loop {
                stream.write_all(&[0; 65536]).await?;
            }
        }
        // Until the client hangs up.
        Body::Silent => drop(read_until(&mut stream, b"\r\n\r\n").await?),
    }
    stream.shutdown().await
}

async fn read_until(stream: &mut TcpStream, end: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end) && stream.read_buf(&mut bytes).await? > 0 {}
    Ok(bytes)
}

/// GETs `path` from `address` (`host:port`): the status and the body.
///
/// # Errors
/// When nobody accepts, or the answer is cut short.
pub async fn get(address: &str, path: &str) -> std::io::Result<(u16, String)> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let status = head
            .split_whitespace()
            .nth(1)
            .and_then(|status| status.parse().ok());
        Ok((
            status.ok_or(std::io::ErrorKind::InvalidData)?,
            body.to_owned(),
        ))
    };
    tokio::time::timeout(crate::patience(), ask).await?
}
