use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{Router, extract::ConnectInfo};
use http::Request;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
};
use tokio_io_timeout::TimeoutStream;
use tower_service::Service;

/// How long a connection may take for the head of a request, or be idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a client may take no byte of its answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A common limit of open files is 1,024, and the database, Redis and webhooks need some too.
const MAX_CONNECTIONS: usize = 512;

/// How long requests that are under way may take after the process was asked to stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// After an error such as "too many open files", when the next accept is tried.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves a router over HTTP/1.1, with limits that clients cannot stretch: `axum::serve` has none, so that as many sockets
/// as the process may open files stop all of it, though they send nothing.
///
/// | a client that | is closed |
/// |---|---|
/// | sends no complete head of a request, or nothing after an answer | after the [idle timeout](Self::idle_timeout) |
/// | does not read its answer, also a streamed one | after the [write timeout](Self::write_timeout) without progress |
/// | has connected and not sent its first request, when there are [too many](Self::max_connections) | at once, the oldest first, to make room for a new one |
///
/// With as many requests under way as connections are allowed, new connections wait. The bodies of requests are the
/// application's to limit. Handlers find the client's address in `ConnectInfo<SocketAddr>`.
///
/// ```no_run
/// use axum::Router;
/// use outbox_axum::Server;
/// use tokio::net::TcpListener;
///
/// async fn serve(router: Router, stop: impl Future<Output = ()>) -> std::io::Result<()> {
///     let listener = TcpListener::bind("127.0.0.1:3000").await?;
///     Server::new(listener, router).run_until(stop).await;
///     Ok(())
/// }
/// ```
#[derive(Debug)]
#[must_use = "nothing is served before `run_until` is awaited"]
pub struct Server {
    listener: TcpListener,
    router: Router,
    idle_timeout: Duration,
    write_timeout: Duration,
    max_connections: usize,
    shutdown_grace: Duration,
}

impl Server {
    /// Serves this router on this listener.
    pub fn new(listener: TcpListener, router: Router) -> Self {
        Self {
            listener,
            router,
            idle_timeout: IDLE_TIMEOUT,
            write_timeout: WRITE_TIMEOUT,
            max_connections: MAX_CONNECTIONS,
            shutdown_grace: SHUTDOWN_GRACE,
        }
    }

    /// Sets how long a connection may take for the head of a request, and how long it may be idle between two. Defaults
    /// to 60 s. Behind a load balancer that keeps connections it must be longer than theirs, or they send a request into
    /// a connection that is being closed.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = timeout;
        self
    }

    /// Sets how long a client may read nothing while there is something to read. Defaults to 30 s.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.write_timeout = timeout;
        self
    }

    /// Sets how many connections are open at the same time. Defaults to 512; 0 counts as 1. All listeners together should
    /// stay well below the limit of open files (`ulimit -n`): the database, Redis and webhooks need some too.
    pub fn max_connections(mut self, connections: usize) -> Self {
        self.max_connections = connections.max(1);
        self
    }

    /// Sets how long requests that are under way may take after the process was asked to stop; then they are dropped.
    /// Defaults to 10 s.
    pub fn shutdown_grace(mut self, grace: Duration) -> Self {
        self.shutdown_grace = grace;
        self
    }

    /// Serves until `stop` completes; then accepts nothing new, closes idle connections, and returns when the requests
    /// under way have ended or the [grace time](Self::shutdown_grace) is over.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes all connections at once, like a grace time of zero.
    pub async fn run_until(self, stop: impl Future<Output = ()>) {
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(self.idle_timeout);
        let silent = Silent::default();
        let (stopping, stopped) = watch::channel(());
        let mut connections = JoinSet::new();
        let mut stop = pin!(stop);
        'serving: for id in 0.. {
            let (stream, address) = tokio::select! {
                () = &mut stop => break,
                accepted = accept(&self.listener) => accepted,
            };
            while connections.try_join_next().is_some() {}
            while connections.len() >= self.max_connections {
                silent.close_oldest();
                tokio::select! {
                    () = &mut stop => break 'serving,
                    _ = connections.join_next() => {}
                }
            }
            let router = self.router.clone();
            let speaks = silent.clone();
            let service = service_fn(move |mut request: Request<Incoming>| {
                speaks.remove(id);
                request.extensions_mut().insert(ConnectInfo(address));
                router.clone().call(request)
            });
            let connection = http.serve_connection(TokioIo::new(self.limited(stream)), service).with_upgrades();
            let (too_many, gone, mut stopped) = (silent.insert(id), silent.clone(), stopped.clone());
            connections.spawn(async move {
                let mut connection = pin!(connection);
                tokio::select! {
                    // What a client does wrong is no error of this process.
                    _ = connection.as_mut() => {}
                    Ok(()) = too_many => {}
                    _ = stopped.changed() => {
                        connection.as_mut().graceful_shutdown();
                        let _ = connection.await;
                    }
                }
                gone.remove(id);
            });
        }
        drop(self.listener);
        drop(stopping);
        let ending = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(self.shutdown_grace, ending).await.is_err() {
            tracing::warn!("requests that were still under way after the grace time are dropped");
        }
    }

    fn limited(&self, stream: TcpStream) -> Pin<Box<TimeoutStream<TcpStream>>> {
        // Fails only for a socket that is closed already.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.write_timeout));
        Box::pin(stream)
    }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                tracing::error!(%error, "no connection can be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Connections that have not sent a request yet, in the order in which they came.
#[derive(Clone, Default)]
struct Silent(Arc<Mutex<BTreeMap<u64, oneshot::Sender<()>>>>);

impl Silent {
    /// Receives a value if the connection is to be closed.
    fn insert(&self, id: u64) -> oneshot::Receiver<()> {
        let (close, closed) = oneshot::channel();
        self.all().insert(id, close);
        closed
    }

    fn remove(&self, id: u64) {
        self.all().remove(&id);
    }

    fn close_oldest(&self) {
        if let Some((_, close)) = self.all().pop_first() {
            // An error means that it has just ended.
            let _ = close.send(());
        }
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
