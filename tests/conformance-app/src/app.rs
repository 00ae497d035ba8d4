use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    routing::{get, post},
};
use outbox_axum::{Error, OutboxLayer};
use outbox_seaorm::Outbox;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{op, poison, tables};

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct App {
    outbox: Outbox,
    late_push_errors: Arc<AtomicU64>,
}

/// The API of the service on this outbox.
pub fn router(outbox: Outbox) -> Router {
    let app = App { outbox: outbox.clone(), late_push_errors: Arc::default() };
    Router::new()
        .route("/op", post(op::op))
        .route("/poison", post(poison::push))
        .layer(OutboxLayer::new(outbox))
        .route("/orders", get(orders))
        .route("/direct", post(direct))
        .route("/late_push_errors", get(late_push_errors))
        .with_state(app)
}

impl App {
    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// How often an event was refused because its request had ended.
    pub(crate) fn late_push_errors(&self) -> Arc<AtomicU64> {
        self.late_push_errors.clone()
    }
}

async fn orders(State(app): State<App>) -> Result<Json<Vec<String>>, Error> {
    Ok(Json(tables::orders(app.outbox.reader()).await?))
}

#[derive(Debug, Deserialize)]
struct Direct {
    op: String,
}

/// Writes with the connections of the requests and without a transaction. A connection that came back to the pool with
/// a transaction still open would swallow it.
async fn direct(State(app): State<App>, Json(Direct { op }): Json<Direct>) -> Result<(StatusCode, Json<Value>), Error> {
    tables::insert_order(app.outbox.writer(), &op, "direct").await?;
    Ok((StatusCode::CREATED, Json(json!({ "op": op }))))
}

async fn late_push_errors(State(app): State<App>) -> Json<u64> {
    Json(app.late_push_errors.load(Ordering::Relaxed))
}
