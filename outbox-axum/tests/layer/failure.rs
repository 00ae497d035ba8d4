//! What goes wrong is a definite answer, and stores nothing.

use axum::{Router, body::Body, extract::Path, routing::post as post_to};
use futures_util::FutureExt;
use http::{Request, StatusCode};
use outbox_axum::{Error, Events, OnlyEvents, OutboxLayer, Tx};
use outbox_core::Context;
use outbox_seaorm::Outbox;
use outbox_test_servers::Postgres;
use sea_orm::ConnectionTrait;

use crate::{
    log,
    support::{Answer, App, Store, build_app, build_app_with, insert, place, placed, post, route, send},
};

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
    held.tx().begin_now().await.unwrap();
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
    held.tx().begin_now().await.unwrap();
    are_503_with_a_time_to_retry(&router).await;
    held.rollback().await;
    assert_eq!(send(&router, post()).await.facts(), (201, "committed"));
}

/// Handlers that live on without the database: they ignore that a statement failed, or use what came of the second.
fn with_a_fallback(db: impl Into<Outbox>) -> Router {
    let falls_back = |tx: Tx| async move {
        let _ignored = insert(&tx, "a").await;
        "from the cache"
    };
    let tries_again = |tx: Tx| async move {
        let _ignored = insert(&tx, "a").await;
        insert(&tx, "a").await?;
        Ok::<_, Error>("stored")
    };
    Router::new().route("/", post_to(falls_back)).route("/events", post_to(tries_again)).layer(OutboxLayer::new(db))
}

#[tokio::test]
async fn a_database_that_was_not_there_and_was_ignored_is_a_503() {
    let store = Store::new().await;
    let outbox = Outbox::new(store.impatient().await);
    let held = outbox.begin(Context::default());
    held.tx().begin_now().await.unwrap();
    are_503_with_a_time_to_retry(&with_a_fallback(outbox)).await;
    // The same of a database that is busy.
    are_503_with_a_time_to_retry(&with_a_fallback(store.impatient().await)).await;
    held.rollback().await;
}

/// What the database refuses because of the values.
async fn refused(router: &Router, sql: &str) -> (u16, String) {
    let answer = send(router, Request::post("/").body(Body::from(sql.to_owned())).unwrap()).await;
    assert!(is_quiet(&answer), "{answer:?}");
    assert_eq!(answer.header("outbox-outcome"), Some("rolled-back"), "{sql}");
    (answer.status.as_u16(), answer.body)
}

fn executes(layer: OutboxLayer) -> Router {
    let handler = |tx: Tx, sql: String| async move {
        tx.execute_unprepared(&sql).await?;
        Ok::<_, Error>(StatusCode::CREATED)
    };
    Router::new().route("/", post_to(handler)).layer(layer)
}

const INVALID: &str = r#"{"error":"a value of the request is not valid; change the request"}"#;

const VALUES: &str = "create table amounts (id integer primary key, n integer not null check (n > 0), t text unique)";

#[tokio::test]
async fn a_value_that_sqlite_refuses_is_a_422() {
    let store = Store::new().await;
    let db = store.outbox.writer();
    db.execute_unprepared(VALUES).await.unwrap();
    db.execute_unprepared("create table strict_amounts (n integer) strict").await.unwrap();
    let router = executes(store.layer());
    for sql in [
        "insert into amounts (n) values (0)",
        "insert into amounts (n) values (null)",
        "insert into amounts (id, n) values ('no number', 1)",
        "insert into strict_amounts values ('no number')",
        "insert into amounts (n, t) values (1, zeroblob(2000000000))",
    ] {
        assert_eq!(refused(&router, sql).await, (422, INVALID.to_owned()), "{sql}");
    }
    let twice = "insert into amounts (rowid, n) values (1, 1), (1, 1)";
    assert_eq!(refused(&router, twice).await.0, 409);
}

#[tokio::test]
async fn a_value_that_postgresql_refuses_is_a_422() {
    let outbox = Outbox::connect(&Postgres::shared().database(), 2).await.unwrap();
    let db = outbox.writer();
    db.execute_unprepared(VALUES).await.unwrap();
    let ranges = "create table ranges (r int4range, exclude using gist (r with &&))";
    db.execute_unprepared(ranges).await.unwrap();
    let router = executes(OutboxLayer::new(outbox.clone()));
    for sql in [
        "insert into amounts values (1, 0)",
        "insert into amounts values (1, null)",
        "insert into amounts values (1, 'no number')",
        "insert into amounts values (1, 2147483647 + 1)",
        "insert into amounts select 1, 1, string_agg(random()::text, '') from generate_series(1, 10000)",
        "select '1'::varchar(1)::date",
        "select repeat('[', 100000)::jsonb",
    ] {
        assert_eq!(refused(&router, sql).await, (422, INVALID.to_owned()), "{sql}");
    }
    for sql in ["insert into amounts values (1, 1, 'a'), (2, 1, 'a')", "insert into ranges values ('[1,5]'), ('[2,3]')"]
    {
        assert_eq!(refused(&router, sql).await.0, 409, "{sql}");
    }
    assert_eq!(refused(&router, "select * from nowhere").await.0, 500);
}

#[tokio::test]
async fn a_text_with_a_nul_is_a_422_on_postgresql_and_stored_by_sqlite() {
    let handler = |tx: Tx| async move {
        insert(&tx, "a\0b").await?;
        Ok::<_, Error>(StatusCode::CREATED)
    };
    let app = build_app(handler).await;
    assert_eq!(app.post().await.facts(), (201, "committed"));
    let outbox = Outbox::connect(&Postgres::shared().database(), 2).await.unwrap();
    outbox.writer().execute_unprepared("create table orders (op text primary key)").await.unwrap();
    let answer = send(&route(OutboxLayer::new(outbox), handler), post()).await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((422, "rolled-back"), INVALID));
}

#[tokio::test]
async fn missing_layer_names_the_fix() {
    let with_tx = |_: Tx| async {};
    let with_events = |_: Events| async {};
    let router = Router::new().route("/tx", post_to(with_tx)).route("/events", post_to(with_events));
    for (path, name) in [("/tx", "Tx"), ("/events", "Events")] {
        let answer = send(&router, Request::post(path).body(Body::empty()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR);
        let what =
            format!("`{name}` used without `OutboxLayer` around it; add `.layer(OutboxLayer::new(…))` to the router");
        assert!(answer.body.starts_with(&what), "{}", answer.body);
    }
}

#[tokio::test]
async fn missing_layer_names_the_orders_that_are_wrong() {
    let store = Store::new().await;
    let handler = |tx: Tx| async move { place(&tx, "a").await };
    let outer = |_: Tx, request: axum::extract::Request, next: axum::middleware::Next| next.run(request);
    let layered = || Router::new().route("/other", post_to(handler)).layer(store.layer());
    let routes = |path| Router::new().route(path, post_to(handler));
    for router in [
        layered().route("/in", post_to(handler)),
        layered().merge(routes("/in")),
        layered().nest("/in", routes("/")),
        layered().fallback(handler),
        routes("/other").fallback(handler).route_layer(store.layer()),
        routes("/in").layer(store.layer()).layer(axum::middleware::from_fn(outer)),
    ] {
        let answer = send(&router, Request::post("/in").body(Body::empty()).unwrap()).await;
        assert_eq!(answer.facts(), (500, "no outcome"));
        for order in
            ["after its routes, nested routers and fallback", "a middleware that is added later", "`route_layer`"]
        {
            assert!(answer.body.contains(order), "{}", answer.body);
        }
    }
    assert!(store.is_empty().await);
}

#[tokio::test]
async fn a_write_beside_the_open_transaction_is_named_in_the_log() {
    log::record();
    let store = Store::new().await;
    let db = store.impatient().await;
    let beside = move |tx: Tx, path: Path<String>| {
        let db = db.clone();
        async move {
            if *path == "tx" {
                place(&tx, "a").await;
            }
            insert(&db, "b").await?;
            Ok::<_, Error>(StatusCode::CREATED)
        }
    };
    let router = Router::new().route("/beside/{what}", post_to(beside)).layer(store.layer());
    let request = |path: &str| Request::post(path).body(Body::empty()).unwrap();
    assert_eq!(send(&router, request("/beside/tx")).await.facts(), (503, "rolled-back"));
    assert_eq!(send(&router, request("/beside/nothing")).await.facts(), (201, "committed"));
    // Busy, but not because of itself.
    let held = store.outbox.begin(Context::default());
    held.tx().begin_now().await.unwrap();
    assert_eq!(send(&router, request("/beside/nothing")).await.facts(), (503, "rolled-back"));
    held.rollback().await;
    let lines = log::lines_with("/beside/{what}");
    assert!(lines.len() == 1 && lines[0].contains("use `&tx` for it"), "{lines:?}");
}

#[tokio::test]
async fn only_events_can_be_refused_or_warned_about() {
    log::record();
    let store = Store::new().await;
    let only_events = |events: Events| async move { events.push(placed("a")).map(|_| ()).unwrap() };
    let with_tx = |tx: Tx| async move { place(&tx, "b").await };
    let router = |about| {
        let layer = store.layer().only_events(about);
        Router::new().route("/only/{id}", post_to(only_events)).route("/tx", post_to(with_tx)).layer(layer)
    };
    let request = |path: &str| Request::post(path).body(Body::empty()).unwrap();
    let refuses = router(OnlyEvents::Refuse);
    assert_eq!(send(&refuses, request("/only/1")).await.facts(), (500, "rolled-back"));
    assert!(store.is_empty().await);
    assert_eq!(send(&refuses, request("/tx")).await.facts(), (200, "committed"));
    assert_eq!(send(&router(OnlyEvents::Warn), request("/only/2")).await.facts(), (200, "committed"));
    assert_eq!(send(&router(OnlyEvents::Allow), request("/only/3")).await.facts(), (200, "committed"));
    assert_eq!(store.payloads().await.len(), 3);
    let lines = log::lines_with("/only/{id}");
    assert!(lines.len() == 2 && lines[0].contains("ERROR") && lines[1].contains("WARN"), "{lines:?}");
}

#[tokio::test]
async fn a_failed_commit_is_logged_with_method_route_and_cause() {
    log::record();
    let store = Store::new().await;
    let handler = |tx: Tx| async move {
        tx.execute_unprepared("insert into lines values ('missing')").await.unwrap();
    };
    let router = Router::new().route("/failing/{id}", post_to(handler)).layer(store.layer());
    send(&router, Request::post("/failing/7?secret=1").body(Body::empty()).unwrap()).await;
    let lines = log::lines_with("/failing/");
    assert_eq!(lines.len(), 1, "{lines:?}");
    for expected in ["ERROR", "method=POST", r#"path="/failing/{id}""#, "FOREIGN KEY constraint failed"] {
        assert!(lines[0].contains(expected), "{expected} is not in {lines:?}");
    }
    assert!(!lines[0].contains("secret"), "{lines:?}");
}
