//! Delivers the events of an outbox with [apalis](https://docs.rs/apalis) workers.
//!
//! A [`Worker`] runs one apalis worker for each subscription. Its queue is the database: [`OutboxBackend`] is an apalis
//! `Backend` over the store, so every attempt of a delivery is an apalis task, and the layers and the dashboard of
//! apalis work on deliveries. Attempts, schedule, lease and errors live in the database alone; apalis never retries.
//!
//! ```no_run
//! use outbox_apalis::{Handlers, Worker};
//! use outbox_core::{Delivery, DeliveryError, Event, LogPublisher, Subscription};
//! use outbox_seaorm::Outbox;
//! use sea_orm::ConnectionTrait;
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct OrderPlaced {
//!     order_id: i64,
//! }
//!
//! impl Event for OrderPlaced {
//!     const TYPE: &'static str = "order.placed";
//!     const AGGREGATE_TYPE: &'static str = "order";
//!
//!     fn aggregate_id(&self) -> String {
//!         self.order_id.to_string()
//!     }
//! }
//!
//! async fn send_mail(event: OrderPlaced, delivery: Delivery) -> Result<(), DeliveryError> {
//!     println!("mail about order {} (attempt {})", event.order_id, delivery.attempt());
//!     Ok(())
//! }
//!
//! # async fn run(outbox: Outbox) -> Result<(), Box<dyn std::error::Error>> {
//! let worker = Worker::new(outbox)
//!     .handlers(Subscription::new("mails")?.events(["order.placed"])?, Handlers::new().on(send_mail))
//!     .handlers(
//!         Subscription::new("totals")?.events(["order.placed"])?,
//!         // Effect, inbox and acknowledgement in one transaction: exactly once.
//!         Handlers::new().on_tx(|_: OrderPlaced, effect| async move {
//!             effect.tx().execute_unprepared("update totals set orders = orders + 1").await?;
//!             Ok(())
//!         }),
//!     )
//!     .publisher(Subscription::new("log")?, LogPublisher);
//! worker.run_until(async { std::future::pending().await }).await?;
//! # Ok(())
//! # }
//! ```

mod assignment;
mod backend;
mod clock;
mod counts;
mod dashboard;
mod desk;
mod destination;
mod feed;
mod handlers;
mod listing;
mod metrics;
mod options;
mod redis;
mod router;
mod task;
mod thread;
mod webhook;
mod worker;

pub use backend::{BackendError, NoCodec, OutboxBackend};
pub use counts::Deliveries;
pub use dashboard::{board_events, dashboard};
pub use handlers::{Effect, Handlers};
pub use options::InvalidOption;
pub use redis::{InvalidRedis, Redis};
pub use task::DeliveryTask;
pub use webhook::{InvalidWebhook, WebhookPublisher};
pub use worker::{StartError, StartedWorker, Worker};
