//! Requests that take too long. A statement that waits for a lock of the test is one that takes as long as the test likes.

use std::time::Duration;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::post as post_to,
};
use futures_util::{StreamExt, stream};
use http::StatusCode;
use outbox_axum::{OutboxLayer, Tx};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::Outbox;
use outbox_test_servers::Postgres;
use sea_orm::{ConnectOptions, ConnectionTrait, Database, DatabaseTransaction, DbBackend, Statement, TransactionTrait};
use tokio::time::timeout;

use crate::{
    log,
    support::{Answer, Store, build_app, build_app_with, eventually, insert, place, placed, post, route, send},
};

const LIMIT: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_secs(20);

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

/// A middleware that gives up, as `tower_http::timeout` does.
async fn gives_up(request: Request, next: Next) -> Response {
    timeout(LIMIT, next.run(request)).await.unwrap_or_else(|_| StatusCode::REQUEST_TIMEOUT.into_response())
}

/// A statement that takes as long as [`Slow::lock`] is held.
async fn slow_statement(tx: &Tx) {
    tx.execute_unprepared("select pg_advisory_xact_lock(1)").await.unwrap();
}

/// Leaves a statement running.
async fn leaves_a_statement(tx: &Tx) {
    place(tx, "a").await;
    timeout(LIMIT, slow_statement(tx)).await.unwrap_err();
}

/// A PostgreSQL database whose slow statement is slow.
struct Slow {
    outbox: Outbox,
    lock: DatabaseTransaction,
}

impl Slow {
    async fn new() -> Self {
        let outbox = Outbox::connect(&Postgres::shared().database(), 4).await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        outbox.writer().execute_unprepared("create table orders (op text primary key)").await.unwrap();
        let lock = outbox.reader().begin().await.unwrap();
        lock.execute_unprepared("select pg_advisory_xact_lock(1)").await.unwrap();
        Self { outbox, lock }
    }

    fn layer(&self) -> OutboxLayer {
        OutboxLayer::new(self.outbox.clone())
    }

    /// The answer, which comes while the statement is running; it ends afterwards, and nothing of the request commits.
    async fn answer(self, router: Router) -> Answer {
        let answer = timeout(DEADLINE, send(&router, post())).await.expect("the answer waits for the statement");
        self.lock.rollback().await.unwrap();
        // Has to wait for the row as long as the request's transaction is open.
        insert(self.outbox.writer(), "a").await.unwrap();
        let events = "select count(*) from outbox_events";
        let row = self.outbox.reader().query_one_raw(Statement::from_string(DbBackend::Postgres, events)).await;
        assert_eq!(row.unwrap().unwrap().try_get_by_index::<i64>(0).unwrap(), 0);
        answer
    }
}

#[tokio::test]
async fn a_timeout_inside_does_not_wait_for_the_rollback() {
    let slow = Slow::new().await;
    let handler = |tx: Tx| async move {
        place(&tx, "a").await;
        slow_statement(&tx).await;
    };
    let router = Router::new().route("/", post_to(handler)).layer(from_fn(gives_up)).layer(slow.layer());
    assert_eq!(slow.answer(router).await.facts(), (408, "rolled-back"));
}

#[tokio::test]
async fn an_error_status_does_not_wait_for_the_rollback() {
    let slow = Slow::new().await;
    let handler = |tx: Tx| async move {
        leaves_a_statement(&tx).await;
        StatusCode::BAD_GATEWAY
    };
    let router = route(slow.layer(), handler);
    assert_eq!(slow.answer(router).await.facts(), (502, "rolled-back"));
}

#[tokio::test]
async fn a_panic_does_not_wait_for_the_rollback() {
    async fn handler(tx: Tx) {
        leaves_a_statement(&tx).await;
        panic!("boom");
    }
    let slow = Slow::new().await;
    let router = Router::new().route("/", post_to(handler)).layer(slow.layer());
    assert_eq!(slow.answer(router).await.facts(), (500, "rolled-back"));
}

#[tokio::test]
async fn a_refused_commit_does_not_wait_for_the_rollback() {
    let slow = Slow::new().await;
    let handler = |tx: Tx| async move {
        leaves_a_statement(&tx).await;
        StatusCode::CREATED
    };
    let router = route(slow.layer(), handler);
    assert_eq!(slow.answer(router).await.facts(), (500, "rolled-back"));
}

#[tokio::test]
async fn a_statement_of_a_task_does_not_delay_the_answer() {
    let slow = Slow::new().await;
    let handler = |tx: Tx| async move {
        place(&tx, "a").await;
        let task = tokio::spawn(async move { slow_statement(&tx).await });
        timeout(LIMIT, task).await.unwrap_err();
        StatusCode::CREATED
    };
    let router = route(slow.layer(), handler);
    assert_eq!(slow.answer(router).await.facts(), (500, "rolled-back"));
}

#[tokio::test]
async fn a_timeout_inside_does_not_wait_on_sqlite_either() {
    let store = Store::new().await;
    // A lock of another file is what the statement waits for, for 5 s at most.
    let other = store.file().replace("test.db", "other.db");
    let attach = format!("attach database '{other}' as other; create table other.orders (op text)");
    store.outbox.writer().execute_unprepared(&attach).await.unwrap();
    let mut options = ConnectOptions::new(format!("sqlite://{other}"));
    let lock = Database::connect(options.max_connections(1).to_owned()).await.unwrap();
    lock.execute_unprepared("begin exclusive").await.unwrap();
    let impatient = store.impatient().await;

    let handler = |tx: Tx| async move {
        place(&tx, "a").await;
        tx.execute_unprepared("insert into other.orders values ('a')").await.unwrap();
    };
    let router = Router::new().route("/", post_to(handler)).layer(from_fn(gives_up)).layer(store.layer());
    assert_eq!(send(&router, post()).await.facts(), (408, "rolled-back"));
    let open = impatient.execute_unprepared("begin immediate").await;
    assert!(open.is_err(), "the answer came after the end of the rollback");
    lock.execute_unprepared("rollback").await.unwrap();
    eventually("the rollback ends", async || store.can_write().await).await;
    assert!(store.is_empty().await);
}

async fn waits_for_the_body(_: Bytes) {
    panic!("the body does not end");
}

/// A request whose body never ends.
fn upload() -> Request {
    let first = stream::once(async { Ok::<_, std::io::Error>(Bytes::from("a")) });
    Request::post("/").body(Body::from_stream(first.chain(stream::pending()))).unwrap()
}

#[tokio::test]
async fn a_slow_upload_holds_an_eager_transaction_for_its_max_age() {
    log::record();
    let store = Store::new().await;
    let layer = store.layer().eager(true).max_age(LIMIT);
    let router = Router::new().route("/upload/{id}", post_to(waits_for_the_body)).layer(layer);
    let mut request = upload();
    *request.uri_mut() = "/upload/1".parse().unwrap();
    let answer = timeout(DEADLINE, send(&router, request)).await.expect("it is dropped");
    assert_eq!(answer.facts(), (408, "rolled-back"));
    assert_eq!(
        answer.body,
        r#"{"error":"this took too long and nothing of it was stored; send it faster, or less at once"}"#
    );
    assert!(store.can_write().await);
    let lines = log::lines_with("/upload/{id}");
    assert!(lines.len() == 1 && lines[0].contains("WARN"), "{lines:?}");
}

#[tokio::test]
async fn a_slow_upload_after_a_statement_holds_it_for_its_max_age() {
    let app = build_app_with(
        |layer| layer.max_age(LIMIT),
        |tx: Tx, request: Request| async move {
            place(&tx, "a").await;
            axum::body::to_bytes(request.into_body(), usize::MAX).await.unwrap();
        },
    )
    .await;
    let answer = timeout(DEADLINE, send(&app.router, upload())).await.expect("it is dropped");
    assert_eq!(answer.facts(), (408, "rolled-back"));
    assert!(app.store.can_write().await && app.store.is_empty().await);
}

#[tokio::test]
async fn a_task_that_holds_the_transaction_is_no_way_around_the_max_age() {
    let app = build_app_with(
        |layer| layer.max_age(LIMIT),
        |tx: Tx| async move {
            tokio::spawn(async move {
                place(&tx, "a").await;
                std::future::pending::<()>().await;
            })
            .await
            .unwrap();
        },
    )
    .await;
    assert_eq!(timeout(DEADLINE, app.post()).await.expect("it is dropped").facts(), (408, "rolled-back"));
    assert!(app.store.can_write().await && app.store.is_empty().await);
}

#[tokio::test]
async fn time_before_the_first_statement_does_not_count() {
    let app = build_app_with(
        |layer| layer.max_age(LIMIT),
        |tx: Tx| async move {
            tx.events().push(placed("a")).unwrap();
            tokio::time::sleep(2 * LIMIT).await;
        },
    )
    .await;
    assert_eq!(app.post().await.facts(), (200, "committed"));
}

#[tokio::test]
async fn an_inner_layer_may_give_more_or_less_time() {
    let handler = |tx: Tx| async move {
        place(&tx, "a").await;
        tokio::time::sleep(2 * LIMIT).await;
    };
    for (outer, inner, expected) in [(LIMIT, DEADLINE, (200, "committed")), (DEADLINE, LIMIT, (408, "rolled-back"))] {
        let store = Store::new().await;
        let router = route(store.layer().max_age(inner), handler).layer(store.layer().max_age(outer));
        assert_eq!(send(&router, post()).await.facts(), expected);
    }
    let store = Store::new().await;
    let begun = |tx: Tx, request: Request, next: Next| async move {
        tx.begin_now().await.unwrap();
        next.run(request).await
    };
    let inner = route(store.layer().max_age(LIMIT), waits_for_the_body);
    let router = inner.layer(from_fn(begun)).layer(store.layer());
    let answer = timeout(DEADLINE, send(&router, upload())).await.expect("it is dropped");
    assert_eq!(answer.facts(), (408, "rolled-back"));
    assert!(store.can_write().await);
}

#[tokio::test]
async fn others_write_while_a_body_arrives_before_the_first_statement() {
    let app = build_app(|tx: Tx, _: Bytes| async move { place(&tx, "a").await }).await;
    tokio::select! {
        _ = send(&app.router, upload()) => unreachable!("the body does not end"),
        answer = app.post() => assert_eq!(answer.facts(), (200, "committed")),
    }
}
