use std::{
    error::Error,
    future::ready,
    io, iter,
    net::IpAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::Uri;
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::{
    client::legacy::{self, Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use outbox_core::DeliveryError;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio::net::TcpStream;
use tower_service::Service;

use super::{
    Seconds,
    address::{Allowed, Resolver, Unreachable},
    answer::plain,
};

/// As many idle connections as a worker has deliveries under way by default.
const IDLE_CONNECTIONS: usize = 10;

/// Servers close idle connections, Node.js for one after 5 s; a request that meets the end of its connection fails.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Longest head of an answer, in bytes.
const MAX_HEAD_BYTES: usize = 64 * 1024;

pub(super) type HttpClient = Client<Connector, String>;

/// A client that follows no redirects, uses no proxies and speaks HTTP/1.1.
// Not reqwest: its TLS without aws-lc-rs (`rustls-no-provider`) makes every plain `reqwest::Client::new()` elsewhere in
// the application panic.
pub(super) fn client(allowed: &Allowed, authorities: &Arc<RootCertStore>, timeout: Duration) -> HttpClient {
    let allowed = Arc::new(allowed.clone());
    let mut http = HttpConnector::new_with_resolver(Resolver(allowed.clone()));
    http.enforce_http(false);
    http.set_nodelay(true);
    // Divided among the addresses of a name, so that one that is silent does not use up the time of the others.
    http.set_connect_timeout(Some(timeout));
    let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the cipher suites of TLS 1.2 and 1.3")
        .with_root_certificates(authorities.clone())
        .with_no_client_auth();
    let connector = Connector { https: HttpsConnector::from((http, tls)), allowed, timeout };
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        .http1_max_buf_size(MAX_HEAD_BYTES)
        .build(connector)
}

/// Mozilla's list, which sqlx uses too: the same everywhere, also in an image without certificates.
pub(super) fn public_authorities() -> RootCertStore {
    RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned())
}

/// Connects to allowed addresses only, in limited time.
#[derive(Clone)]
pub(super) struct Connector {
    https: HttpsConnector<HttpConnector<Resolver>>,
    allowed: Arc<Allowed>,
    timeout: Duration,
}

type BoxError = Box<dyn Error + Send + Sync>;

impl Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.https.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        // The resolver is asked for names only.
        if let Some(Err(refused)) = literal_address(&uri).map(|address| self.allowed.check(address)) {
            return Box::pin(ready(Err(refused.into())));
        }
        let (connecting, timeout) = (self.https.call(uri), self.timeout);
        Box::pin(async move { tokio::time::timeout(timeout, connecting).await.map_err(|_| TooSlow(Seconds(timeout)))? })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("timed out after {0}")]
struct TooSlow(Seconds);

fn literal_address(uri: &Uri) -> Option<IpAddr> {
    uri.host()?.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Why there is no answer. Another attempt may find the destination in better health.
pub(super) fn failed(error: &legacy::Error, origin: &str) -> DeliveryError {
    let cause = plain(&describe(error));
    match error.is_connect() {
        true => DeliveryError::unreachable(format!("no connection to {origin}: {cause}")),
        // It may have the request, and may have died of it; or it accepts connections and dies of everything.
        false => DeliveryError::unavailable(format!("no answer from {origin}: {cause}")),
    }
}

/// The cause that helps, without the layers around it.
fn describe(error: &legacy::Error) -> String {
    let causes: Vec<&(dyn Error + 'static)> = iter::successors(Some(error as _), |&error| cause(error)).collect();
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
