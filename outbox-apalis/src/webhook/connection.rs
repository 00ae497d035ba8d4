use std::{
    collections::HashSet,
    error::Error,
    fmt,
    future::ready,
    io, iter,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{Extensions, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::legacy::{
        self, Client,
        connect::{HttpConnector, HttpInfo, proxy::Tunnel},
    },
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use outbox_core::DeliveryError;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio::net::TcpStream;
use tower_service::Service;

use super::{
    address::{Allowed, Resolver, Unreachable},
    answer::plain,
    proxy::Proxy,
};

/// As many idle connections as a worker has deliveries under way by default.
const IDLE_CONNECTIONS: usize = 10;

/// Servers close idle connections, Node.js for one after 5 s.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Longest head of an answer, in bytes and in headers.
const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 1000;

/// How many connections are remembered that have had an answer.
const REMEMBERED: usize = 1000;

type PlainClient = Client<Connector, Full<Bytes>>;

/// A client that follows no redirects, uses no proxy but the one it is told, and speaks HTTP/1.1.
// Not reqwest: its TLS without aws-lc-rs (`rustls-no-provider`) makes every plain `reqwest::Client::new()` elsewhere in
// the application panic.
#[derive(Clone)]
pub(super) struct HttpClient {
    pooled: PlainClient,
    /// Each request on a connection of its own.
    fresh: PlainClient,
    /// Connections that have had an answer, by their end on this side.
    answered: Arc<Mutex<HashSet<SocketAddr>>>,
}

impl HttpClient {
    pub(super) fn new(
        allowed: &Allowed,
        authorities: &Arc<RootCertStore>,
        timeout: Duration,
        proxy: Option<&Proxy>,
    ) -> Self {
        let connector = Connector::new(allowed, authorities, timeout, proxy);
        Self {
            pooled: client(connector.clone(), IDLE_CONNECTIONS),
            fresh: client(connector, 0),
            answered: Arc::default(),
        }
    }

    /// Sends a request and waits for the head of the answer.
    ///
    /// A destination may close a connection at the very moment at which it is used again, or have reset it after its last
    /// answer. That says nothing about this request, so it goes out once more, on a new one. The receiver has perhaps had
    /// it; it knows repetitions by their id.
    pub(super) async fn request(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, legacy::Error> {
        let again = request.clone();
        let result = self.pooled.request(request).await;
        match result {
            Ok(answer) => {
                self.remember(answer.extensions());
                Ok(answer)
            }
            Err(error) if self.was_reused(&error) => self.fresh.request(again).await,
            Err(error) => Err(error),
        }
    }

    fn remember(&self, connection: &Extensions) {
        let Some(info) = connection.get::<HttpInfo>() else { return };
        let mut answered = self.answered();
        if answered.len() >= REMEMBERED {
            answered.clear();
        }
        answered.insert(info.local_addr());
    }

    /// Whether the connection that broke had answered before, and now has not.
    fn was_reused(&self, error: &legacy::Error) -> bool {
        let Some(connection) = error.connect_info() else { return false };
        let mut extras = Extensions::new();
        connection.get_extras(&mut extras);
        let reused = extras.get::<HttpInfo>().is_some_and(|info| self.answered().remove(&info.local_addr()));
        reused && !error.is_connect() && !is_unreadable(error)
    }

    fn answered(&self) -> MutexGuard<'_, HashSet<SocketAddr>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client(connector: Connector, idle: usize) -> PlainClient {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(idle)
        .http1_max_buf_size(MAX_HEAD_BYTES)
        .http1_max_headers(MAX_HEADERS)
        .build(connector)
}

/// Mozilla's list, which sqlx uses too: the same everywhere, also in an image without certificates.
pub(super) fn public_authorities() -> RootCertStore {
    RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned())
}

/// Connects to allowed addresses only, in limited time.
#[derive(Clone)]
pub(super) struct Connector {
    way: Way,
    allowed: Arc<Allowed>,
    timeout: Duration,
}

#[derive(Clone)]
enum Way {
    Direct(HttpsConnector<HttpConnector<Resolver>>),
    /// The proxy looks up names.
    Proxy(HttpsConnector<Tunnel<HttpConnector<Resolver>>>),
}

type BoxError = Box<dyn Error + Send + Sync>;

impl Connector {
    fn new(allowed: &Allowed, authorities: &Arc<RootCertStore>, timeout: Duration, proxy: Option<&Proxy>) -> Self {
        let allowed = Arc::new(allowed.clone());
        // Who names a proxy means it, wherever it is.
        let reached = if proxy.is_some() { Arc::new(Allowed::everything()) } else { allowed.clone() };
        let mut http = HttpConnector::new_with_resolver(Resolver(reached));
        http.enforce_http(false);
        http.set_nodelay(true);
        // Divided among the addresses of a name, so that one that is silent does not use up the time of the others.
        http.set_connect_timeout(Some(timeout));
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has the cipher suites of TLS 1.2 and 1.3")
            .with_root_certificates(authorities.clone())
            .with_no_client_auth();
        let way = match proxy {
            None => Way::Direct(HttpsConnector::from((http, tls))),
            Some(proxy) => Way::Proxy(HttpsConnector::from((proxy.tunnel(http), tls))),
        };
        Self { way, allowed, timeout }
    }
}

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match &mut self.way {
            Way::Direct(https) => https.poll_ready(cx),
            Way::Proxy(https) => https.poll_ready(cx),
        }
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        // The resolver is asked for names only, and with a proxy not even for those.
        if let Some(Err(refused)) = literal_address(&uri).map(|address| self.allowed.check(address)) {
            return Box::pin(ready(Err(refused.into())));
        }
        let timeout = self.timeout;
        let connecting: Self::Future = match &mut self.way {
            Way::Direct(https) => Box::pin(https.call(uri)),
            // A tunnel to a port that is not named would be one to that of TLS.
            Way::Proxy(https) => Box::pin(https.call(with_port(uri))),
        };
        Box::pin(async move { tokio::time::timeout(timeout, connecting).await.map_err(|_| TooSlow(Seconds(timeout)))? })
    }
}

fn with_port(uri: Uri) -> Uri {
    if uri.port().is_some() || uri.scheme_str() != Some("http") {
        return uri;
    }
    let authority = format!("{}:80", uri.host().unwrap_or_default());
    let with_port = Uri::builder().scheme("http").authority(authority).path_and_query("/").build();
    with_port.unwrap_or(uri)
}

#[derive(Debug, thiserror::Error)]
#[error("timed out after {0}")]
struct TooSlow(Seconds);

/// A length of time as people write it: `15 s`.
#[derive(Debug)]
pub(super) struct Seconds(pub(super) Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s", self.0.as_secs_f64())
    }
}

/// An address that is written out, or the name that is always this machine.
fn literal_address(uri: &Uri) -> Option<IpAddr> {
    let host = uri.host()?.trim_end_matches('.');
    if host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost") {
        return Some(Ipv4Addr::LOCALHOST.into());
    }
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Why there is no answer. Another attempt may find the destination in better health.
pub(super) fn failed(error: &legacy::Error, origin: &str) -> DeliveryError {
    let cause = plain(&describe(error));
    if let Some(limit) = own_limit(error) {
        return DeliveryError::not_begun(format!("no connection to {origin}: {limit}"));
    }
    if error.is_connect() {
        return DeliveryError::unreachable(format!("no connection to {origin}: {cause}"));
    }
    if is_unreadable(error) {
        // It is there, and answers this event so.
        return DeliveryError::retry(format!("no answer from {origin}: what came cannot be read: {cause}"));
    }
    // It may have the request, and may have died of it; or it accepts connections and dies of everything.
    DeliveryError::unavailable(format!("no answer from {origin}: {cause}"))
}

fn is_unreadable(error: &legacy::Error) -> bool {
    causes(error).any(|cause| cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse))
}

/// What this process or machine has run out of, if that is the cause.
fn own_limit(error: &legacy::Error) -> Option<&'static str> {
    let of_io = causes(error).filter_map(|cause| cause.downcast_ref::<io::Error>()).find_map(limit);
    // Looking up names does not tell; a socket of our own does.
    let unresolved = || causes(error).any(|cause| matches!(cause.downcast_ref(), Some(Unreachable::Unresolved(_))));
    of_io.or_else(|| limit(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).err().filter(|_| unresolved()).as_ref()?))
}

fn limit(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EMFILE => Some("this process has no file descriptors left; raise its limit of open files (ulimit -n)"),
        libc::ENFILE => Some("this machine has no file descriptors left; raise its limit of open files"),
        libc::ENOBUFS | libc::ENOMEM => Some("this machine has no memory left for connections"),
        libc::EADDRNOTAVAIL => Some("this machine has no address or port left to connect from"),
        _ => None,
    }
}

fn causes<'a>(error: &'a legacy::Error) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    iter::successors(Some(error as &(dyn Error + 'static)), |&error| cause(error))
}

/// The cause that helps, without the layers around it.
fn describe(error: &legacy::Error) -> String {
    let causes: Vec<_> = causes(error).collect();
    let refused = causes.iter().find_map(|cause| match cause.downcast_ref()? {
        refused @ Unreachable::NotPublic(_) => Some(refused.to_string()),
        unresolved @ Unreachable::Unresolved(error) => Some(format!("{unresolved}: {error}")),
    });
    let of_tls = || causes.iter().find_map(|cause| cause.downcast_ref::<rustls::Error>());
    // A wrapped one has its cause behind it, except that of a timeout, which says less.
    let tells = |error: &&io::Error| error.get_ref().is_none() || error.kind() == io::ErrorKind::TimedOut;
    let of_io = || causes.iter().filter_map(|cause| cause.downcast_ref::<io::Error>()).find(tells);
    refused
        .or_else(|| of_tls().map(|error| format!("TLS failed: {error}")))
        .or_else(|| of_io().map(|error| error.kind().to_string()))
        .or_else(|| causes.last().map(|error| error.to_string()))
        .unwrap_or_default()
}

/// An I/O error skips what it wraps in its own `source`.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(wrapped) => Some(wrapped),
        None => error.source(),
    }
}
