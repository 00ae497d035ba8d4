//! The server: what a client can hold up, and how it ends.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool, atomic::Ordering},
    time::Duration,
};

use axum::{Router, body::Body, extract::ConnectInfo, routing::get};
use futures_util::stream;
use outbox_axum::Server;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Notify, oneshot},
    task::JoinHandle,
};

const MS: Duration = Duration::from_millis(1);
const LIMIT: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

async fn run(router: Router, limits: fn(Server) -> Server) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let server = limits(Server::new(listener, router));
    let ended = tokio::spawn(server.run_until(async {
        let _ = stopped.await;
    }));
    Running { address, stop, ended }
}

fn hello() -> Router {
    Router::new()
        .route("/", get(|ConnectInfo(address): ConnectInfo<SocketAddr>| async move { address.ip().to_string() }))
}

async fn sent(address: SocketAddr, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

/// What arrives until the server closes.
async fn rest(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut read)).await.expect("the connection is closed");
    String::from_utf8(read).unwrap()
}

async fn asked(address: SocketAddr) -> String {
    rest(&mut sent(address, "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await).await
}

#[tokio::test]
async fn a_request_finds_room_among_half_open_ones() {
    let server = run(hello(), |server| server.max_connections(8)).await;
    let mut silent = Vec::new();
    for n in 0..40 {
        silent.push(sent(server.address, if n % 2 == 0 { "" } else { "GET / HTTP/1.1\r\nhost:" }).await);
    }
    for _ in 0..20 {
        let answer = asked(server.address).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("127.0.0.1"), "{answer}");
    }
    assert_eq!(rest(&mut silent[0]).await, "", "the oldest has made room");
}

#[tokio::test]
async fn a_request_under_way_makes_no_room_for_another() {
    let go_on = Arc::new(Notify::new());
    let handler = {
        let go_on = go_on.clone();
        get(|| async move {
            go_on.notified().await;
            "done"
        })
    };
    let server = run(Router::new().route("/", handler), |server| server.max_connections(2)).await;
    let request = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let mut working = [sent(server.address, request).await, sent(server.address, request).await];
    let mut waiting = Vec::new();
    for _ in 0..5 {
        waiting.push(sent(server.address, "GET").await);
    }
    for stream in &mut working {
        go_on.notify_one();
        assert!(rest(stream).await.ends_with("done"));
    }
}

#[tokio::test]
async fn half_a_head_and_an_idle_connection_are_closed_in_time() {
    let server = run(hello(), |server| server.idle_timeout(50 * MS)).await;
    for text in ["", "GET / HTTP/1.1\r\nx-half:", "GET / HTTP/1.1\r\nhost: x\r\n\r\n"] {
        let answer = rest(&mut sent(server.address, text).await).await;
        assert_eq!(answer.is_empty(), !text.ends_with("\r\n\r\n"), "{text:?}: {answer}");
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_closed_in_time() {
    struct Gone(Arc<AtomicBool>, Arc<Notify>);
    impl Drop for Gone {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
            self.1.notify_one();
        }
    }
    let (gone, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
    let handler = {
        let (gone, told) = (gone.clone(), told.clone());
        get(|| async move {
            let endless = stream::unfold(Gone(gone, told), |gone| async move {
                Some((Ok::<_, std::io::Error>(vec![b'x'; 64 * 1024]), gone))
            });
            Body::from_stream(endless)
        })
    };
    let server = run(Router::new().route("/", handler), |server| server.write_timeout(100 * MS)).await;
    let _stalled = sent(server.address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    tokio::time::timeout(LIMIT, told.notified()).await.expect("the stream is dropped");
    assert!(gone.load(Ordering::SeqCst));
}

#[tokio::test]
async fn requests_under_way_end_after_a_stop() {
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let handler = {
        let (begun, go_on) = (begun.clone(), go_on.clone());
        get(|| async move {
            begun.notify_one();
            go_on.notified().await;
            "done"
        })
    };
    let server = run(Router::new().route("/", handler), |server| server).await;
    let mut idle = sent(server.address, "").await;
    let mut working = sent(server.address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    begun.notified().await;
    server.stop.send(()).unwrap();
    assert_eq!(rest(&mut idle).await, "", "an idle connection is closed");
    assert!(TcpStream::connect(server.address).await.is_err(), "nothing new is accepted");
    go_on.notify_one();
    assert!(rest(&mut working).await.ends_with("done"));
    tokio::time::timeout(LIMIT, server.ended).await.expect("it ends").unwrap();
}

#[tokio::test]
async fn what_does_not_end_in_the_grace_time_is_dropped() {
    let begun = Arc::new(Notify::new());
    let handler = {
        let begun = begun.clone();
        get(|| async move {
            begun.notify_one();
            std::future::pending::<()>().await;
        })
    };
    let server = run(Router::new().route("/", handler), |server| server.shutdown_grace(50 * MS)).await;
    let mut working = sent(server.address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
    begun.notified().await;
    server.stop.send(()).unwrap();
    tokio::time::timeout(LIMIT, server.ended).await.expect("it ends").unwrap();
    assert_eq!(rest(&mut working).await, "");
}
