//! What goes wrong is a definite answer, and stores nothing.

use std::{cell::RefCell, sync::Once};

use axum::{Router, body::Body, routing::post as post_to};
use futures_util::FutureExt;
use http::{Request, StatusCode};
use outbox_axum::{Error, Events, OutboxLayer, Tx};
use outbox_core::Context;
use outbox_seaorm::Outbox;
use sea_orm::ConnectionTrait;

use crate::support::{Answer, App, Store, build_app, build_app_with, insert, place, placed, post, send};

/// Takes some milliseconds, and long enough to be cancelled.
const SLOW: &str = "insert into orders
    with recursive n (i) as (select 1 union all select i + 1 from n where i < 50000)
    select 'slow ' || max(i) from n";

const INTERNAL: &str = r#"{"error":"the request failed; the log of the service says why"}"#;

/// No word of the database may reach a client.
fn is_quiet(answer: &Answer) -> bool {
    !["UNIQUE", "constraint", "orders", "sqlite", "boom"].iter().any(|word| answer.body.contains(word))
}

fn panicking<H, T>(store: &Store, handler: H) -> Router
where
    H: axum::handler::Handler<T, ()>,
    T: 'static,
{
    Router::new().route("/", post_to(handler)).layer(store.layer())
}

async fn is_a_500_that_stores_nothing(app: &App) {
    let answer = app.post().await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((500, "rolled-back"), INTERNAL));
    assert!(app.store.is_empty().await && app.store.can_write().await);
}

#[tokio::test]
async fn a_panic_is_a_500_and_stores_nothing() {
    async fn handler(tx: Tx) {
        place(&tx, "a").await;
        panic!("boom");
    }
    let store = Store::new().await;
    let router = panicking(&store, handler);
    is_a_500_that_stores_nothing(&App { router, store }).await;
}

#[tokio::test]
async fn a_panic_before_the_first_statement_is_a_500() {
    async fn handler(_: Tx, Events(events): Events) {
        panic!("boom, {} events", events.len());
    }
    let store = Store::new().await;
    let router = panicking(&store, handler);
    is_a_500_that_stores_nothing(&App { router, store }).await;
}

#[tokio::test]
async fn a_panic_in_the_call_of_the_service_is_a_500() {
    use tower::{ServiceExt, service_fn};
    let store = Store::new().await;
    let panics =
        service_fn(|_: Request<Body>| -> std::future::Ready<Result<http::Response<Body>, std::convert::Infallible>> {
            panic!("boom")
        });
    let service = tower::Layer::layer(&store.layer(), panics);
    let response = service.oneshot(post()).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
}

#[tokio::test]
async fn a_panic_while_the_context_is_read_is_a_500() {
    let app = build_app_with(|layer| layer.context(|_| panic!("boom")), |tx: Tx| async move { place(&tx, "a").await });
    is_a_500_that_stores_nothing(&app.await).await;
}

#[tokio::test]
async fn a_swallowed_error_in_the_middle_is_a_500_and_stores_nothing() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        let _ignored = insert(&tx, "a").await;
        let refused = insert(&tx, "b").await.unwrap_err();
        assert!(refused.to_string().contains("an earlier statement of this transaction failed"), "{refused}");
        StatusCode::CREATED
    })
    .await;
    is_a_500_that_stores_nothing(&app).await;
}

#[tokio::test]
async fn a_swallowed_error_of_the_last_statement_is_a_500_and_stores_nothing() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        let _ignored = insert(&tx, "a").await;
        StatusCode::CREATED
    })
    .await;
    is_a_500_that_stores_nothing(&app).await;
}

#[tokio::test]
async fn a_statement_that_was_cancelled_is_a_500_and_stores_nothing() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        assert!(tx.execute_unprepared(SLOW).now_or_never().is_none(), "cancelled halfway");
        StatusCode::CREATED
    })
    .await;
    is_a_500_that_stores_nothing(&app).await;
}

#[tokio::test]
async fn a_unique_violation_is_a_409_without_the_text_of_the_database() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        insert(&tx, "a").await?;
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    let answer = app.post().await;
    assert_eq!(answer.facts(), (409, "rolled-back"));
    assert_eq!(answer.body, r#"{"error":"this does not fit what is stored already; change the request"}"#);
    assert!(app.store.is_empty().await);
}

#[tokio::test]
async fn a_broken_statement_is_a_500_without_the_text_of_the_database() {
    let app = build_app(|tx: Tx| async move {
        tx.execute_unprepared("insert into nowhere values (1)").await?;
        Ok::<_, Error>(StatusCode::CREATED)
    })
    .await;
    is_a_500_that_stores_nothing(&app).await;
}

#[tokio::test]
async fn a_constraint_that_refuses_the_commit_is_a_409_and_stores_nothing() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        tx.execute_unprepared("insert into lines values ('missing')").await.unwrap();
        StatusCode::CREATED
    })
    .await;
    let answer = app.post().await;
    assert_eq!(answer.facts(), (409, "rolled-back"));
    assert!(is_quiet(&answer), "{answer:?}");
    assert!(app.store.is_empty().await && app.store.can_write().await);
}

#[tokio::test]
async fn a_flush_that_fails_is_a_500_and_stores_nothing() {
    let app = build_app(|tx: Tx| async move { place(&tx, "a").await }).await;
    app.store.outbox.writer().execute_unprepared("alter table outbox_events rename to moved").await.unwrap();
    let answer = app.post().await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((500, "rolled-back"), INTERNAL));
    app.store.outbox.writer().execute_unprepared("alter table moved rename to outbox_events").await.unwrap();
    assert!(app.store.is_empty().await);
    assert_eq!(app.post().await.facts(), (200, "committed"));
}

/// A handler that uses the transaction, and one that leaves everything to the flush.
fn writers(db: impl Into<Outbox>) -> Router {
    let with_tx = |tx: Tx| async move {
        insert(&tx, "a").await?;
        Ok::<_, Error>(StatusCode::CREATED)
    };
    let only_events = |events: Events| async move {
        events.push(placed("a"))?;
        Ok::<_, Error>(StatusCode::CREATED)
    };
    Router::new().route("/", post_to(with_tx)).route("/events", post_to(only_events)).layer(OutboxLayer::new(db))
}

async fn are_503_with_a_time_to_retry(router: &Router) {
    for path in ["/", "/events"] {
        let answer = send(router, Request::post(path).body(Body::empty()).unwrap()).await;
        assert_eq!((answer.facts(), answer.header("retry-after")), ((503, "rolled-back"), Some("1")), "{path}");
        assert!(is_quiet(&answer), "{answer:?}");
    }
}

#[tokio::test]
async fn an_exhausted_pool_is_a_503_with_a_time_to_retry() {
    let store = Store::new().await;
    let db = store.impatient().await;
    let outbox = Outbox::new(db);
    let held = outbox.begin(Context::default());
    held.tx().begin().await.unwrap();
    let router = writers(outbox);
    are_503_with_a_time_to_retry(&router).await;
    held.rollback().await;
    assert_eq!(send(&router, post()).await.facts(), (201, "committed"));
}

#[tokio::test]
async fn a_busy_database_is_a_503_with_a_time_to_retry() {
    let store = Store::new().await;
    let router = writers(store.impatient().await);
    let held = store.outbox.begin(Context::default());
    held.tx().begin().await.unwrap();
    are_503_with_a_time_to_retry(&router).await;
    held.rollback().await;
    assert_eq!(send(&router, post()).await.facts(), (201, "committed"));
}

#[tokio::test]
async fn missing_layer_names_the_fix() {
    let with_tx = |_: Tx| async {};
    let with_events = |_: Events| async {};
    let router = Router::new().route("/tx", post_to(with_tx)).route("/events", post_to(with_events));
    for (path, name) in [("/tx", "Tx"), ("/events", "Events")] {
        let answer = send(&router, Request::post(path).body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(
            answer.body,
            format!("`{name}` used without `OutboxLayer`; add `.layer(OutboxLayer::new(…))` to the router")
        );
    }
}

thread_local! {
    static LOGGED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Writes to the log of the thread that logs.
#[derive(Clone, Copy)]
struct Log;

impl Log {
    /// One subscriber for the whole process: beside a thread that has its own alone, tracing may take what another
    /// thread logs first for something that nobody wants, for good.
    fn start() {
        static STARTED: Once = Once::new();
        STARTED.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| Self).init());
        LOGGED.with_borrow_mut(Vec::clear);
    }

    fn of_this_thread() -> String {
        LOGGED.with_borrow(|log| String::from_utf8(log.clone()).unwrap())
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.with_borrow_mut(|log| log.extend_from_slice(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_failed_commit_is_logged_with_method_route_and_cause() {
    Log::start();
    let store = Store::new().await;
    let handler = |tx: Tx| async move {
        tx.execute_unprepared("insert into lines values ('missing')").await.unwrap();
    };
    let router = Router::new().route("/orders/{id}", post_to(handler)).layer(store.layer());
    send(&router, Request::post("/orders/7?secret=1").body(Body::empty()).unwrap()).await;
    let log = Log::of_this_thread();
    for expected in ["ERROR", "method=POST", r#"path="/orders/{id}""#, "FOREIGN KEY constraint failed"] {
        assert!(log.contains(expected), "{expected} is not in {log}");
    }
    assert!(!log.contains("secret"), "{log}");
}
