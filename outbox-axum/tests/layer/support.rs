//! An application of one handler, and a witness that sees only what is committed.

use std::{future::Future, panic::AssertUnwindSafe, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    handler::Handler,
    middleware::{Next, from_fn},
    response::IntoResponse,
    routing::any,
};
use futures_util::FutureExt;
use http::{HeaderMap, Request, StatusCode};
use outbox_axum::{OutboxLayer, Tx};
use outbox_core::NewEvent;
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{Outbox, entity::events};
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseConnection, DbBackend, DbErr, EntityTrait, QueryOrder,
    Statement, sqlx::sqlite::SqliteJournalMode,
};
use tempfile::TempDir;
use tower::ServiceExt;

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

/// A database of its own for each test.
pub(crate) struct Store {
    pub(crate) outbox: Outbox,
    witness: DatabaseConnection,
    url: String,
    folder: TempDir,
}

impl Store {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}?mode=rwc", folder.path().join("test.db").display());
        let outbox = Outbox::connect(&url, 2).await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        for table in [
            "create table orders (op text primary key)",
            "create table lines (op text not null references orders (op) deferrable initially deferred)",
        ] {
            outbox.writer().execute_unprepared(table).await.unwrap();
        }
        let witness = Database::connect(ConnectOptions::new(url.clone())).await.unwrap();
        Self { outbox, witness, url, folder }
    }

    /// One connection that nobody waits for: the second borrower gives up at once.
    pub(crate) async fn impatient(&self) -> DatabaseConnection {
        let mut options = ConnectOptions::new(self.url.clone());
        options.max_connections(1).acquire_timeout(Duration::from_millis(50)).map_sqlx_sqlite_opts(|options| {
            options.journal_mode(SqliteJournalMode::Wal).busy_timeout(Duration::from_millis(50))
        });
        Database::connect(options).await.unwrap()
    }

    pub(crate) fn layer(&self) -> OutboxLayer {
        OutboxLayer::new(self.outbox.clone())
    }

    /// The path of the database's file.
    pub(crate) fn file(&self) -> String {
        self.folder.path().join("test.db").display().to_string()
    }

    pub(crate) async fn orders(&self) -> Vec<String> {
        self.strings("select op as value from orders order by op").await
    }

    /// The payloads in the order of their positions, byte for byte.
    pub(crate) async fn payloads(&self) -> Vec<String> {
        self.strings("select payload as value from outbox_events order by position").await
    }

    pub(crate) async fn events(&self) -> Vec<events::Model> {
        events::Entity::find().order_by_asc(events::Column::Position).all(&self.witness).await.unwrap()
    }

    pub(crate) async fn is_empty(&self) -> bool {
        self.orders().await.is_empty() && self.payloads().await.is_empty()
    }

    /// Whether the write connection is free and has no transaction left over.
    pub(crate) async fn can_write(&self) -> bool {
        self.outbox.writer().execute_unprepared("begin immediate; rollback").await.is_ok()
    }

    pub(crate) fn witness(&self) -> DatabaseConnection {
        self.witness.clone()
    }

    async fn strings(&self, sql: &str) -> Vec<String> {
        let rows = self.witness.query_all_raw(Statement::from_string(DbBackend::Sqlite, sql)).await.unwrap();
        rows.iter().map(|row| row.try_get("", "value").unwrap()).collect()
    }
}

/// An application with one handler behind the layer.
pub(crate) struct App {
    pub(crate) router: Router,
    pub(crate) store: Store,
}

pub(crate) async fn build_app<H, T>(handler: H) -> App
where
    H: Handler<T, ()>,
    T: 'static,
{
    build_app_with(|layer| layer, handler).await
}

pub(crate) async fn build_app_with<H, T>(configure: impl FnOnce(OutboxLayer) -> OutboxLayer, handler: H) -> App
where
    H: Handler<T, ()>,
    T: 'static,
{
    let store = Store::new().await;
    let layer = configure(store.layer());
    App { router: route(layer, handler), store }
}

/// One handler behind a layer. A handler that panics is a 418, or its failed assertions would look like the 500 that
/// many tests expect.
pub(crate) fn route<H, T>(layer: OutboxLayer, handler: H) -> Router
where
    H: Handler<T, ()>,
    T: 'static,
{
    let no_panic = |request: Request<Body>, next: Next| async move {
        let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
        answer.unwrap_or_else(|_| StatusCode::IM_A_TEAPOT.into_response())
    };
    Router::new().route("/", any(handler)).layer(from_fn(no_panic)).layer(layer)
}

impl App {
    pub(crate) async fn post(&self) -> Answer {
        send(&self.router, post()).await
    }
}

pub(crate) fn post() -> Request<Body> {
    Request::post("/").body(Body::empty()).unwrap()
}

pub(crate) async fn send(router: &Router, request: Request<Body>) -> Answer {
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap();
    Answer { status: parts.status, headers: parts.headers, body: String::from_utf8(body.into()).unwrap() }
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Status and outcome: what a client needs to know.
    pub(crate) fn facts(&self) -> (u16, &str) {
        (self.status.as_u16(), self.header("outbox-outcome").unwrap_or("no outcome"))
    }
}

pub(crate) async fn insert(tx: &impl ConnectionTrait, op: &str) -> Result<(), DbErr> {
    let sql = "insert into orders (op) values ($1)";
    tx.execute_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, [op.into()])).await.map(|_| ())
}

pub(crate) fn placed(op: &str) -> NewEvent {
    NewEvent::dynamic("order.placed", "order", op, &serde_json::json!({ "op": op })).unwrap()
}

/// What most handlers of these tests do first.
pub(crate) async fn place(tx: &Tx, op: &str) {
    insert(tx, op).await.unwrap();
    tx.events().push(placed(op)).unwrap();
}

/// Waits until something that happens in another task has happened.
pub(crate) async fn eventually<F, Fut>(what: &str, condition: F)
where
    F: Fn() -> Fut,
    Fut: Future<Output = bool>,
{
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}
