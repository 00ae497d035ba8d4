use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use chrono::{DateTime, Utc};
use http::{Method, Request, Uri, header};
use http_body_util::Full;
use hyper::body::Bytes;
use outbox_core::{Delivery, DeliveryError, Publisher, RetryPolicy};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use url::Url;
use uuid::Uuid;

use address::Allowed;
use answer::Hidden;
use connection::{HttpClient, Seconds};
use proxy::Proxy;
use signature::Signer;

mod address;
mod answer;
mod cloud_event;
mod connection;
mod invalid;
mod proxy;
mod signature;

pub use invalid::InvalidWebhook;

/// Longest time for a name, a connection and its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for a whole attempt.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Where events come from, unless the application says it.
const SOURCE: &str = "/outbox";

/// Posts each event to a URL, signed, so that the receiver can tell who sent it.
///
/// The body is a [CloudEvents 1.0](https://cloudevents.io) event in JSON (`application/cloudevents+json`). Its `data` is
/// the payload, byte for byte. Beside the required attributes it has `subject` (the aggregate id), `time` (when the fact
/// happened), `aggregatetype`, `dataschemaversion`, and where known `tenant`, `correlationid`, `causationid`,
/// `traceparent` and `tracestate`.
///
/// The headers are those of [Standard Webhooks](https://www.standardwebhooks.com): `webhook-id` (the event id),
/// `webhook-timestamp` (seconds, when this attempt began by the database's clock) and `webhook-signature`. Every receiver's library for Standard Webhooks
/// verifies them.
///
/// Events arrive **at least once**: again after an error, a timeout, or a crash before the success was stored, with the
/// same `webhook-id` each time, by which the receiver drops repetitions.
///
/// | the destination | the delivery |
/// |---|---|
/// | answers 2xx | is done; the body is not read |
/// | answers 408, 425, 429 or 5xx | is tried again, no earlier than its `Retry-After` asks (1 h at most) |
/// | answers 3xx or any other 4xx | is tried again until the destination has taken another event, then becomes a dead letter; redirects are never followed |
/// | answers what cannot be read (not HTTP, a head of more than 64 KiB or 1,000 headers) | is tried again |
/// | cannot be reached, breaks off, fails at TLS, or takes too long | is tried again |
///
/// When events of five different keys have failed in a row, whatever the answers were, and none was taken meanwhile, the
/// destination counts as down: nothing more is spent until it takes one again. So a receiver that answers 404 or 401 to
/// everything while it is deployed costs no event. After three days it does.
///
/// What only some events meet is tried again for about a day, as [`RetryPolicy::patient`] says, unless the subscription
/// [says otherwise](outbox_core::Subscription::retry).
///
/// A connection that is used again and breaks before the answer is no failure: the request goes out once more, at once, on
/// a new one. While this process has no file descriptors or ports left, no attempt is spent.
///
/// # Addresses
///
/// Connections go to public addresses only, whatever name the URL has and whatever it resolves to at that moment, so a URL
/// that a customer typed cannot reach the network of the worker. [`allow`](Self::allow) and
/// [`allow_loopback`](Self::allow_loopback) open what is meant to be reached. Proxies of the environment are not used; one
/// that is meant is given to [`proxy`](Self::proxy).
///
/// ```no_run
/// use outbox_apalis::{WebhookPublisher, Worker};
/// use outbox_core::Subscription;
///
/// # fn worker(worker: Worker, secret: &str) -> Result<Worker, Box<dyn std::error::Error>> {
/// let publisher = WebhookPublisher::new("https://hooks.example.com/orders", secret)?
///     .source("https://shop.example.com")?
///     .allow("10.20.0.0/16")?;
/// Ok(worker.publisher(Subscription::new("webhook")?.events(["order.*"])?, publisher))
/// # }
/// ```
pub struct WebhookPublisher {
    uri: Uri,
    hidden: Hidden,
    signer: Signer,
    source: String,
    timeout: Duration,
    connect_timeout: Duration,
    allowed: Allowed,
    authorities: Arc<RootCertStore>,
    proxy: Option<Proxy>,
    client: HttpClient,
}

impl WebhookPublisher {
    /// Posts to `url` and signs with `secret`: `whsec_` and the base64 of 24 to 64 random bytes.
    ///
    /// # Errors
    ///
    /// [`InvalidWebhook`] if the URL is none, is not `http` or `https` or contains a user name or password, or if the
    /// secret has another form.
    pub fn new(url: &str, secret: &str) -> Result<Self, InvalidWebhook> {
        let mut url = Url::parse(url).map_err(|error| InvalidWebhook::Url(error.into()))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(InvalidWebhook::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(InvalidWebhook::Userinfo);
        }
        url.set_fragment(None);
        let uri = Uri::try_from(url.as_str()).map_err(|error| InvalidWebhook::Url(error.into()))?;
        let allowed = Allowed::default();
        let authorities = Arc::new(connection::public_authorities());
        let client = HttpClient::new(&allowed, &authorities, CONNECT_TIMEOUT, None);
        Ok(Self {
            uri,
            hidden: Hidden::of(&url),
            signer: Signer::new(secret)?,
            source: SOURCE.to_owned(),
            timeout: TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
            allowed,
            authorities,
            proxy: None,
            client,
        })
    }

    /// Adds a second signature by another secret, for as long as receivers change from one to the other: each event
    /// then verifies with either. May be called again for more.
    ///
    /// # Errors
    ///
    /// If the secret has another form than [`new`](Self::new) wants.
    pub fn also_sign_with(mut self, secret: &str) -> Result<Self, InvalidWebhook> {
        self.signer.add(secret)?;
        Ok(self)
    }

    /// Sets the CloudEvents `source`: a URI reference that names this application. Defaults to `/outbox`.
    ///
    /// # Errors
    ///
    /// If it is empty or has characters that no URI has.
    pub fn source(mut self, uri: impl Into<String>) -> Result<Self, InvalidWebhook> {
        self.source = cloud_event::source(uri.into())?;
        Ok(self)
    }

    /// Sets how long looking up the name, connecting and the TLS handshake may take together. Defaults to 5 s.
    ///
    /// # Errors
    ///
    /// If it is zero.
    pub fn connect_timeout(mut self, timeout: Duration) -> Result<Self, InvalidWebhook> {
        self.connect_timeout = more_than_zero(timeout)?;
        Ok(self.reconnected())
    }

    /// Sets how long an attempt may take, from looking up the name to the last byte that is read. Defaults to 15 s; keep
    /// it below the worker's [`timeout`](crate::Worker::timeout).
    ///
    /// # Errors
    ///
    /// If it is zero.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, InvalidWebhook> {
        self.timeout = more_than_zero(timeout)?;
        Ok(self)
    }

    /// Also connects to this machine, `127.0.0.0/8` and `::1`: for development and tests.
    #[must_use]
    pub fn allow_loopback(mut self) -> Self {
        self.allowed.loopback();
        self.reconnected()
    }

    /// Also connects to one internal address (`10.0.0.7`, `fd00::7`) or network (`10.0.0.0/8`, `fd00::/8`). May be
    /// called again for more.
    ///
    /// # Errors
    ///
    /// If the text is neither, or has bits set behind the prefix (`10.0.0.7/8`).
    pub fn allow(mut self, network: &str) -> Result<Self, InvalidWebhook> {
        self.allowed.network(network)?;
        Ok(self.reconnected())
    }

    /// Also trusts certificates that these authorities have signed, given in PEM form. Without, the authorities of
    /// Mozilla's list are trusted, those of the operating system are not. May be called again for more.
    ///
    /// # Errors
    ///
    /// If the text holds no certificate, or one that cannot be read.
    pub fn trust(mut self, pem: &str) -> Result<Self, InvalidWebhook> {
        let authorities = Arc::make_mut(&mut self.authorities);
        let before = authorities.len();
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            let certificate = certificate.map_err(|error| InvalidWebhook::Certificate(Some(error.into())))?;
            authorities.add(certificate).map_err(|error| InvalidWebhook::Certificate(Some(error.into())))?;
        }
        if authorities.len() == before {
            return Err(InvalidWebhook::Certificate(None));
        }
        Ok(self.reconnected())
    }

    /// Connects through this HTTP proxy, `http://HOST:PORT` or `http://USER:PASSWORD@HOST:PORT`: the usual way to give
    /// deliveries a fixed source address, or a network that reaches nothing inside. It is asked for a tunnel (`CONNECT`), for
    /// `https` and for `http`, so it sees neither the events nor the signatures of `https`. Never taken from the environment.
    /// Defaults to none.
    ///
    /// **The proxy looks up the names, so it has to be the one that refuses internal addresses.** Here only addresses that
    /// are written out, and `localhost`, are still checked. The address of the proxy itself may be any.
    ///
    /// A proxy that is away or refuses counts as a destination that cannot be reached.
    ///
    /// # Errors
    ///
    /// If the URL has another form. The error does not show it.
    pub fn proxy(mut self, url: &str) -> Result<Self, InvalidWebhook> {
        self.proxy = Some(Proxy::new(url)?);
        Ok(self.reconnected())
    }

    fn reconnected(mut self) -> Self {
        self.client = HttpClient::new(&self.allowed, &self.authorities, self.connect_timeout, self.proxy.as_ref());
        self
    }

    fn request(&self, id: Uuid, at: DateTime<Utc>, body: String) -> Result<Request<Full<Bytes>>, http::Error> {
        // A clock before 1970 signs a time that every receiver refuses, and says so.
        let timestamp = u64::try_from(at.timestamp()).unwrap_or_default();
        let id = id.to_string();
        Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(header::CONTENT_TYPE, cloud_event::CONTENT_TYPE)
            .header(header::USER_AGENT, concat!("outbox/", env!("CARGO_PKG_VERSION")))
            .header("webhook-signature", self.signer.sign(&id, timestamp, &body))
            .header("webhook-timestamp", timestamp)
            .header("webhook-id", id)
            .body(body.into())
    }

    /// Scheme, host and port, all of the URL that may be shown, and the way there.
    fn route(&self) -> String {
        let proxy = self.proxy.as_ref().map(|proxy| format!(" through the proxy {proxy}"));
        self.origin() + &proxy.unwrap_or_default()
    }

    /// Scheme, host and port: all of the URL that may be shown.
    fn origin(&self) -> String {
        let scheme = self.uri.scheme_str().unwrap_or_default();
        format!("{scheme}://{}", self.uri.authority().map_or("", |authority| authority.as_str()))
    }
}

impl Publisher for WebhookPublisher {
    async fn publish(&self, delivery: &Delivery) -> Result<(), DeliveryError> {
        let event = delivery.event();
        let request = self.request(event.id, delivery.started_at(), cloud_event::body(event, &self.source)?)?;
        let started = Instant::now();
        let answer = match tokio::time::timeout(self.timeout, self.client.request(request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(connection::failed(&error, &self.route())),
            Err(_) => return Err(DeliveryError::unavailable(format!("timed out after {}", Seconds(self.timeout)))),
        };
        if answer.status().is_success() {
            return Ok(());
        }
        let left = self.timeout.saturating_sub(started.elapsed());
        let now = SystemTime::from(delivery.started_at()) + started.elapsed();
        Err(answer::failed(answer, left, now, &self.hidden).await)
    }

    fn retry_policy(&self) -> RetryPolicy {
        RetryPolicy::patient()
    }
}

impl fmt::Debug for WebhookPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookPublisher")
            .field("destination", &self.origin())
            .field("signer", &self.signer)
            .field("source", &self.source)
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("allowed", &self.allowed)
            .finish_non_exhaustive()
    }
}

fn more_than_zero(timeout: Duration) -> Result<Duration, InvalidWebhook> {
    if timeout.is_zero() { Err(InvalidWebhook::Timeout) } else { Ok(timeout) }
}
