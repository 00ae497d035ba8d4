//! The application in this process, and a witness that sees only what is committed.

use std::time::Duration;

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Request, Response},
};
use outbox_core::{Ordering, Subscription};
use outbox_seaorm::{Outbox, entity::events};
use outbox_tests::Database;
use sea_orm::{ConnectionTrait, DbBackend, EntityTrait, QueryOrder, Statement};
use serde_json::{Value, json};
use tower::ServiceExt;

pub(crate) struct App {
    pub(crate) router: Router,
    pub(crate) outbox: Outbox,
    /// The id of the subscription `effects`, so that commits write deliveries as they do beside a worker.
    pub(crate) effects: i32,
    pub(crate) witness: Outbox,
    database: Database,
}

#[derive(Debug)]
pub(crate) struct Answer {
    backend: DbBackend,
    pub(crate) status: u16,
    pub(crate) outcome: String,
    pub(crate) body: Value,
}

impl App {
    /// One on each database.
    pub(crate) async fn each() -> [Self; 2] {
        [Self::on(Database::sqlite(), 2).await, Self::on(Database::postgres(), 2).await]
    }

    pub(crate) async fn on(database: Database, connections: u32) -> Self {
        let outbox = Outbox::connect(&database.url(), connections).await.unwrap();
        conformance_app::migrate(&outbox).await.unwrap();
        let subscription = Subscription::new("effects").unwrap().ordering(Ordering::None);
        let effects = outbox.register(&subscription).await.unwrap();
        let witness = database.open().await;
        Self { router: conformance_app::router(outbox.clone()), outbox, effects, witness, database }
    }

    /// `POST /op` for the op `a` of the key `k` with two events.
    pub(crate) async fn op(&self, mode: &str) -> Answer {
        self.post("/op", &op(mode)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.read(self.respond(path, body).await).await
    }

    /// The response with its body unread.
    pub(crate) async fn respond(&self, path: &str, body: &Value) -> Response<Body> {
        let request = Request::post(path).header("content-type", "application/json");
        self.router.clone().oneshot(request.body(Body::from(body.to_string())).unwrap()).await.unwrap()
    }

    pub(crate) async fn read(&self, response: Response<Body>) -> Answer {
        let (parts, body) = response.into_parts();
        let outcome = parts.headers.get("outbox-outcome").map_or("none", |value| value.to_str().unwrap()).to_owned();
        // The rest of the response is gone before its body is read, as on a connection.
        let status = parts.status.as_u16();
        drop(parts);
        let body = to_bytes(body, usize::MAX).await.unwrap();
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        Answer { backend: self.outbox.writer().get_database_backend(), status, outcome, body }
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let request = Request::get(path).body(Body::empty()).unwrap();
        self.read(self.router.clone().oneshot(request).await.unwrap()).await.body
    }

    pub(crate) async fn orders(&self) -> Vec<String> {
        let statement = Statement::from_string(self.witness.reader().get_database_backend(), "select op from orders");
        let rows = self.witness.reader().query_all_raw(statement).await.unwrap();
        rows.iter().map(|row| row.try_get("", "op").unwrap()).collect()
    }

    pub(crate) async fn events(&self) -> Vec<events::Model> {
        events::Entity::find().order_by_asc(events::Column::Position).all(self.witness.reader()).await.unwrap()
    }

    /// `i` and `seq` of all events, in the order of their positions.
    pub(crate) async fn numbers(&self) -> Vec<(i64, Option<i64>)> {
        let number = |event: &events::Model| (event.payload["i"].as_i64().unwrap(), event.payload["seq"].as_i64());
        self.events().await.iter().map(number).collect()
    }

    /// The op is stored with its events and these extra ones, and is the only one.
    pub(crate) async fn assert_stored(&self, extra: &[i64]) {
        assert_eq!(self.orders().await, ["a"], "{:?}", self.database);
        let extra = extra.iter().map(|i| (*i, None));
        let expected: Vec<_> = [(0, Some(1)), (1, Some(2))].into_iter().chain(extra).collect();
        assert_eq!(self.numbers().await, expected, "{:?}", self.database);
        for event in self.events().await {
            assert_eq!((event.event_type.as_str(), event.aggregate_type.as_str()), ("order.placed", "order"));
            assert_eq!((event.aggregate_id.as_str(), &event.payload["op"]), ("k", &json!("a")));
            assert_eq!(event.payload["key"], "k");
        }
    }

    /// Neither op nor event is stored, the key was not advanced, and no connection has kept a transaction: the same op
    /// comes out as if it were the first.
    pub(crate) async fn assert_nothing_stored(&self) {
        assert_eq!((self.orders().await, self.numbers().await), (vec![], vec![]), "{:?}", self.database);
        self.op("ok").await.assert_committed(201);
        self.assert_stored(&[]).await;
    }
}

impl Answer {
    #[track_caller]
    pub(crate) fn assert_committed(&self, status: u16) {
        assert_eq!((self.status, self.outcome.as_str()), (status, "committed"), "on {:?}: {self:?}", self.backend);
    }

    #[track_caller]
    pub(crate) fn assert_rolled_back(&self, status: u16) {
        assert_eq!((self.status, self.outcome.as_str()), (status, "rolled-back"), "on {:?}: {self:?}", self.backend);
    }
}

pub(crate) fn op(mode: &str) -> Value {
    json!({ "op": "a", "key": "k", "n": 2, "mode": mode, "arg": "" })
}

/// Long enough for a late task to have done its harm.
pub(crate) async fn a_moment() {
    tokio::time::sleep(Duration::from_millis(150)).await;
}
