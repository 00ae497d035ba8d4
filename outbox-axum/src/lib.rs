//! One transaction per request, and events that are stored if and only if it commits.
//!
//! [`OutboxLayer`] opens a unit of work for each request. Handlers write through [`Tx`] and push events into
//! [`Events`]; when the answer is a success, the events are flushed into the outbox and the transaction commits, and
//! only then the response leaves. Workers (`outbox-apalis`) deliver what is committed.
//!
//! ```
//! use axum::{Json, Router, extract::Path, http::StatusCode, routing::post};
//! use outbox_axum::{Error, Events, OutboxLayer, Tx};
//! use outbox_core::Event;
//! use outbox_seaorm::Outbox;
//! use sea_orm::{ActiveModelTrait, ActiveValue::Set};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct TodoCreated {
//!     todo_id: i64,
//!     title: String,
//! }
//!
//! impl Event for TodoCreated {
//!     const TYPE: &'static str = "todo.created";
//!     const AGGREGATE_TYPE: &'static str = "todo";
//!
//!     fn aggregate_id(&self) -> String {
//!         self.todo_id.to_string()
//!     }
//! }
//!
//! async fn create(tx: Tx, events: Events, Json(title): Json<String>) -> Result<(StatusCode, Json<i64>), Error> {
//!     let todo = todo::ActiveModel { title: Set(title), ..Default::default() }.insert(&tx).await?;
//!     events.push(TodoCreated { todo_id: todo.id, title: todo.title })?;
//!     Ok((StatusCode::CREATED, Json(todo.id)))
//! }
//!
//! fn router(outbox: Outbox) -> Router {
//!     Router::new().route("/todos", post(create)).layer(OutboxLayer::new(outbox))
//! }
//! # mod todo {
//! #     use sea_orm::entity::prelude::*;
//! #     #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
//! #     #[sea_orm(table_name = "todos")]
//! #     pub struct Model {
//! #         #[sea_orm(primary_key)]
//! #         pub id: i64,
//! #         pub title: String,
//! #     }
//! #     #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
//! #     pub enum Relation {}
//! #     impl ActiveModelBehavior for ActiveModel {}
//! # }
//! # struct Migrator;
//! # impl outbox_migrations::sea_orm_migration::MigratorTrait for Migrator {
//! #     fn migrations() -> Vec<Box<dyn outbox_migrations::sea_orm_migration::MigrationTrait>> {
//! #         outbox_migrations::all()
//! #     }
//! # }
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # use sea_orm::{ConnectionTrait, EntityTrait};
//! # use tower::ServiceExt;
//! # let folder = tempfile::tempdir()?;
//! # let url = format!("sqlite://{}?mode=rwc", folder.path().join("todo.db").display());
//! # let outbox = Outbox::connect(&url, 1).await?;
//! # outbox_migrations::up::<Migrator>(outbox.writer()).await?;
//! # let table = "create table todos (id integer primary key, title text not null)";
//! # outbox.writer().execute_unprepared(table).await?;
//! # let request = axum::http::Request::post("/todos")
//! #     .header("content-type", "application/json")
//! #     .body(axum::body::Body::from(r#""water the plants""#))?;
//! # let response = router(outbox.clone()).oneshot(request).await?;
//! # assert_eq!(response.status(), StatusCode::CREATED);
//! # assert_eq!(response.headers()["outbox-outcome"], "committed");
//! # let events = outbox_seaorm::entity::events::Entity::find().all(outbox.reader()).await?;
//! # assert_eq!(events[0].event_type, "todo.created");
//! # Ok(())
//! # }
//! ```
//!
//! # What happens to a request
//!
//! | the handler | the client gets | stored | `outbox-outcome` |
//! |---|---|---|---|
//! | answers 101, 2xx or 3xx | its response, after COMMIT | all of it | `committed` |
//! | answers 4xx, 5xx or a gRPC error | its response, at once; the rollback ends by itself | nothing | `rolled-back` |
//! | answers with a [`Decision`] | its response | as decided | as decided |
//! | panics | 500 | nothing | `rolled-back` |
//! | ignores the error of a statement outside a savepoint, or cancels one | 500 | nothing | `rolled-back` |
//! | leaves a [`Tx`] in a spawned task or in the response's stream | 500 | nothing | `rolled-back` |
//! | succeeds, and no connection was free or the database was busy | 503, `retry-after: 1` | nothing | `rolled-back` |
//! | keeps its transaction open for longer than [`max_age`](OutboxLayer::max_age) | 408 | nothing | `rolled-back` |
//! | succeeds, and a deferred constraint refuses the COMMIT | 409 | nothing | `rolled-back` |
//! | succeeds, and the connection dies during COMMIT | 503 | not known | `unknown` |
//! | is cut off because the client hangs up | nothing | nothing | – |
//!
//! The transaction begins with the first statement through [`Tx`], or with the flush when there are only events: a
//! request that uses neither costs no round trip. A client that hangs up while the commit runs does not stop it.
//! A transaction that is rolled back is closed before the answer leaves, and can never commit afterwards; on SQLite the
//! next writer waits until its last statement has ended. A gRPC request gets the layer's own answers as gRPC.
//! A crash of the process before the database has received COMMIT leaves nothing; a crash afterwards leaves
//! everything, though the client did not hear of it.
//!
//! # Rules for handlers
//!
//! - Finish with [`Tx`] before the response is ready. Streamed bodies and spawned tasks use a `DatabaseConnection`.
//! - Statements that may fail go into [`Tx::savepoint`]; after any other failed statement only an error answer makes
//!   sense.
//! - Nothing slow between the first statement and the end: the transaction is open meanwhile. Take the body of the
//!   request as an argument (it is read before the handler runs), not as a stream after the first statement.
//! - Reads that need no transaction use the application's own connection
//!   ([`Outbox::reader`](outbox_seaorm::Outbox::reader)). On SQLite, `Tx` takes the one write lock.
//!
//! [`Operator`] is the other half: status, health and the dashboard, behind a token on a listener of its own.

mod context;
mod decision;
mod error;
mod extract;
mod grpc;
mod layer;
mod nested;
mod operator;
mod outcome;
mod server;
mod service;
mod token;

pub use decision::Decision;
pub use error::Error;
pub use extract::{Events, MissingLayer, Tx};
pub use layer::{OnlyEvents, OutboxLayer};
pub use operator::Operator;
pub use server::Server;
pub use service::OutboxService;
pub use token::{InvalidToken, random_token};
