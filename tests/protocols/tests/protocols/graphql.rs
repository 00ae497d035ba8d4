//! async-graphql behind the layer.

use std::{collections::HashMap, sync::Arc};

use async_graphql::{
    EmptySubscription, Object, Schema,
    dataloader::{DataLoader, Loader},
};
use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::State,
    http::{Request, StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::post,
};
use outbox_axum::{Decision, Error, Events, OutboxLayer, Tx};
use outbox_core::NewEvent;
use outbox_seaorm::Outbox;
use sea_orm::{ConnectionTrait, DbBackend, Statement};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::support::{database, insert, stored};

type Shop = Schema<Query, Mutation, EmptySubscription>;
type Context<'a> = async_graphql::Context<'a>;
type Answer<T> = async_graphql::Result<T>;

struct Query;

#[Object]
impl Query {
    /// How long the name of an order is, found by a data loader.
    async fn length(&self, context: &Context<'_>, op: String) -> Answer<Option<i64>> {
        Ok(context.data::<DataLoader<Lengths>>()?.load_one(op).await?)
    }
}

struct Mutation;

#[Object]
impl Mutation {
    async fn place(&self, context: &Context<'_>, op: String) -> Answer<String> {
        insert(context.data::<Tx>()?, &op).await.map_err(said)?;
        let event = NewEvent::dynamic("order.placed", "order", &op, &()).map_err(said)?;
        context.data::<Events>()?.push(event).map_err(said)?;
        Ok(op)
    }

    async fn length(&self, context: &Context<'_>, op: String) -> Answer<Option<i64>> {
        Ok(context.data::<DataLoader<Lengths>>()?.load_one(op).await?)
    }
}

/// A fixed sentence, as for HTTP: what the database says is not for clients.
fn said(error: impl Into<Error>) -> async_graphql::Error {
    error.into().sentence().into()
}

/// Loads with the transaction of the request, so it sees what the request has written.
struct Lengths(Tx);

impl Loader<String> for Lengths {
    type Value = i64;
    type Error = Arc<sea_orm::DbErr>;

    async fn load(&self, ops: &[String]) -> Result<HashMap<String, i64>, Self::Error> {
        let ops = serde_json::to_string(ops).expect("names are JSON");
        let sql = "select op, length(op) as n from orders where op in (select value from json_each($1))";
        let rows = self.0.query_all_raw(Statement::from_sql_and_values(DbBackend::Sqlite, sql, [ops.into()])).await?;
        Ok(rows.iter().map(|row| (row.try_get("", "op").unwrap(), row.try_get("", "n").unwrap())).collect())
    }
}

async fn graphql(
    State(shop): State<Shop>,
    tx: Tx,
    events: Events,
    Json(request): Json<async_graphql::Request>,
) -> impl IntoResponse {
    let lengths = DataLoader::new(Lengths(tx.clone()), tokio::spawn);
    let response = shop.execute(request.data(tx).data(events).data(lengths)).await;
    let decision = response.is_err().then_some(Decision::Rollback);
    (decision, Json(response))
}

fn router(outbox: &Outbox) -> Router {
    let shop = Schema::new(Query, Mutation, EmptySubscription);
    Router::new().route("/graphql", post(graphql)).layer(OutboxLayer::new(outbox.clone())).with_state(shop)
}

async fn send(router: &Router, query: &str) -> (StatusCode, String, Value) {
    let request = Request::post("/graphql").header(CONTENT_TYPE, "application/json");
    let request = request.body(Body::from(json!({ "query": query }).to_string())).unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    let outcome = response.headers()["outbox-outcome"].to_str().unwrap().to_owned();
    let status = response.status();
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, outcome, serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn a_graphql_success_commits() {
    let outbox = database().await;
    let query = r#"mutation { a: place(op: "a") b: place(op: "bb") }"#;
    let (status, outcome, body) = send(&router(&outbox), query).await;
    assert_eq!((status.as_u16(), outcome.as_str()), (200, "committed"));
    assert_eq!(body, json!({ "data": { "a": "a", "b": "bb" } }));
    assert_eq!(stored(&outbox).await, (2, 2));
}

#[tokio::test]
async fn a_graphql_error_inside_a_200_rolls_everything_back() {
    let outbox = database().await;
    let query = r#"mutation { a: place(op: "a") again: place(op: "a") }"#;
    let (status, outcome, body) = send(&router(&outbox), query).await;
    assert_eq!((status.as_u16(), outcome.as_str()), (200, "rolled-back"));
    let said = "this does not fit what is stored already; change the request";
    assert_eq!(body["errors"][0]["message"], said);
    assert_eq!(stored(&outbox).await, (0, 0));
}

#[tokio::test]
async fn a_query_that_is_not_valid_begins_nothing() {
    let outbox = database().await;
    let (status, outcome, body) = send(&router(&outbox), "{ nothing }").await;
    assert_eq!((status.as_u16(), outcome.as_str()), (200, "rolled-back"));
    assert!(body["errors"][0]["message"].as_str().unwrap().contains("nothing"), "{body}");
}
/// The data loader works in a task of its own, which lets go of the transaction a moment after it has answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_data_loader_in_the_transaction_is_no_obstacle() {
    let outbox = database().await;
    let router = router(&outbox);
    for n in 0..100 {
        let query = format!(r#"mutation {{ place(op: "{n:03}") a: length(op: "{n:03}") b: length(op: "none") }}"#);
        let (status, outcome, body) = send(&router, &query).await;
        assert_eq!((status.as_u16(), outcome.as_str()), (200, "committed"), "{n}: {body}");
        assert_eq!((&body["data"]["a"], &body["data"]["b"]), (&json!(3), &json!(null)), "{body}");
    }
    assert_eq!(stored(&outbox).await, (100, 100));
}
