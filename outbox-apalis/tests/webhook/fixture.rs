use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::ConnectInfo,
    http::{HeaderMap, Method, Uri},
    response::{IntoResponse, Response},
};
use outbox_apalis::WebhookPublisher;
use outbox_core::{Delivery, DeliveryError, Publisher, RecordedEvent};
use tokio::net::{TcpListener, TcpStream};
use uuid::Uuid;

pub(crate) const MS: Duration = Duration::from_millis(1);

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A publisher that may reach this machine.
pub(crate) fn publisher(url: &str) -> WebhookPublisher {
    WebhookPublisher::new(url, SECRET).unwrap().allow_loopback()
}

pub(crate) fn event() -> RecordedEvent {
    RecordedEvent {
        position: 7,
        id: Uuid::from_u128(0x0198_0000_0000_7000_8000_0000_0000_0001),
        event_type: "order.placed".to_owned(),
        schema_version: 2,
        aggregate_type: "order".to_owned(),
        aggregate_id: "17".to_owned(),
        payload: r#"{"total":1}"#.to_owned(),
        occurred_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
        recorded_at: "2026-01-02T03:04:06Z".parse().unwrap(),
        tenant: None,
        actor: None,
        correlation_id: None,
        causation_id: None,
        traceparent: None,
        tracestate: None,
        tags: BTreeMap::new(),
        max_attempts: None,
    }
}

/// One attempt to deliver the event.
pub(crate) async fn publish(publisher: &WebhookPublisher, event: RecordedEvent) -> Result<(), DeliveryError> {
    publisher.publish(&Delivery::new(Arc::new(event), "webhook".into(), 1)).await
}

/// One attempt that fails.
pub(crate) async fn failure(publisher: &WebhookPublisher) -> DeliveryError {
    publish(publisher, event()).await.expect_err("the attempt fails")
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) from: SocketAddr,
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// A destination that remembers what it received.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Receiver {
    /// Answers each request with `answer`.
    pub(crate) async fn start<R: IntoResponse>(
        answer: impl Fn(&Received) -> R + Clone + Send + Sync + 'static,
    ) -> Self {
        let received = Arc::new(Mutex::new(Vec::new()));
        let all = received.clone();
        let handle = move |ConnectInfo(from), method, uri, headers, body| async move {
            let request = Received { from, method, uri, headers, body };
            let answer = answer(&request).into_response();
            all.lock().unwrap().push(request);
            answer
        };
        let router = Router::new().fallback(handle).into_make_service_with_connect_info::<SocketAddr>();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, received }
    }

    /// Answers each request with 204.
    pub(crate) async fn accepting() -> Self {
        Self::start(|_| axum::http::StatusCode::NO_CONTENT).await
    }

    /// Answers each request with this status and these headers.
    pub(crate) async fn answering(status: u16, headers: &'static [(&'static str, &'static str)]) -> Self {
        Self::start(move |_| {
            let mut answer = Response::builder().status(status);
            for &(name, value) in headers {
                answer = answer.header(name, value);
            }
            answer.body(axum::body::Body::from("the body")).unwrap()
        })
        .await
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    pub(crate) fn only(&self) -> Received {
        let received = self.received();
        assert_eq!(received.len(), 1, "{received:?}");
        received.into_iter().next().unwrap()
    }
}

/// A destination that does with each connection what `serve` does.
pub(crate) async fn raw<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(serve(connection));
        }
    });
    address
}

/// Runs the rest of a test in a process of its own with these environment variables: `true` there.
///
/// The environment of this process belongs to all tests at once.
pub(crate) fn in_child(test: &str, environment: &[(&str, &str)]) -> bool {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.envs(environment.iter().copied());
    in_this_child(test, child)
}

/// As [`in_child`], in a process that can open few files.
pub(crate) fn in_limited_child(test: &str, files: u32) -> bool {
    let mut child = std::process::Command::new("sh");
    child.args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\"")]).arg(std::env::current_exe().unwrap());
    in_this_child(test, child)
}

fn in_this_child(test: &str, mut child: std::process::Command) -> bool {
    const MARK: &str = "OUTBOX_WEBHOOK_TEST";
    if std::env::var(MARK).is_ok_and(|running| running == test) {
        return true;
    }
    child.args([test, "--exact", "--test-threads=1"]).env(MARK, test);
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    false
}
