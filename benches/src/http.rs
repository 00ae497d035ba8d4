//! A load of requests over loopback, with a client that costs next to nothing.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use axum::Router;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::AbortHandle,
};

use crate::measure::{Result, percentile, sorted};

/// A router on a port of its own, until it is dropped.
pub(crate) struct Served {
    address: SocketAddr,
    server: AbortHandle,
}

impl Served {
    pub(crate) async fn start(router: Router) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = tokio::spawn(async move { axum::serve(listener, router).await }).abort_handle();
        Ok(Self { address, server })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

pub(crate) struct Load {
    pub(crate) per_second: f64,
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Each client posts to the path, one request after another, until the time is over. Milliseconds are those of a request.
pub(crate) async fn load(served: &Served, path: &str, clients: usize, time: Duration) -> Result<Load> {
    let request = format!("POST {path} HTTP/1.1\r\nhost: bench\r\ncontent-length: 0\r\n\r\n");
    let started = Instant::now();
    let clients: Vec<_> = (0..clients)
        .map(|_| {
            let (address, request) = (served.address, request.clone());
            tokio::spawn(async move { client(address, request.as_bytes(), started + time).await })
        })
        .collect();
    let mut taken = Vec::new();
    for client in clients {
        taken.extend(client.await??);
    }
    let per_second = taken.len() as f64 / started.elapsed().as_secs_f64();
    let taken = sorted(taken.into_iter());
    Ok(Load { per_second, p50: percentile(&taken, 0.5), p99: percentile(&taken, 0.99) })
}

async fn client(address: SocketAddr, request: &[u8], end: Instant) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut taken = Vec::new();
    let mut answer = [0_u8; 2048];
    while Instant::now() < end {
        let started = Instant::now();
        stream.write_all(request).await?;
        let mut read = 0;
        // The answers have no body.
        while !answer[..read].ends_with(b"\r\n\r\n") {
            let more = stream.read(&mut answer[read..]).await?;
            if more == 0 {
                return Err("the server hung up".into());
            }
            read += more;
        }
        if !answer.starts_with(b"HTTP/1.1 201") {
            return Err(String::from_utf8_lossy(&answer[..read]).into());
        }
        taken.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(taken)
}
