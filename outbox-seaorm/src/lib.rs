//! The store of a transactional outbox on SeaORM, and the transaction handle of a request.
//!
//! [`Outbox`] is the handle to everything: it opens units of work ([`Outbox::begin`], [`Outbox::transaction`]) whose
//! events are flushed as the last thing before COMMIT, and it is what workers claim from, acknowledge to and register
//! subscriptions with. Web services reach it through `outbox-axum`, workers through `outbox-apalis`.
//!
//! All SQL stands in one file per database (`src/sqlite.rs`, `src/postgres.rs`). Every time that is compared comes from the database's
//! clock.
//!
//! The feature `stream` (off by default) implements SeaORM's `StreamTrait` for the transaction handles.
//!
//! The feature `testing` (off by default, brings the crate `tempfile`) adds `testing`: an outbox on a temporary file for
//! tests of applications.

mod audit;
mod calls;
mod checkup;
mod claim;
mod clean;
mod connect;
mod dead_letters;
mod definitions;
mod deliveries;
pub mod entity;
mod events;
mod file;
mod flush;
mod inbox;
mod lane_store;
mod lanes;
pub mod metrics;
mod names;
mod notify;
mod outbox;
mod outcome;
mod pooler;
mod postgres;
mod replay;
mod retention;
mod route;
mod sessions;
mod sql;
mod sqlite;
mod status;
mod subscriptions;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod to_its_end;
mod tx;
mod unit_of_work;
mod unrouted;
mod why;
mod workers;

pub use audit::{AuditEntry, By};
pub use checkup::Complaint;
pub use connect::ConnectError;
pub use dead_letters::{Changed, DeadLetter, DeadLetterFilter};
pub use deliveries::{DELIVERIES_LISTED, DamagedEvent, DeliveryRecord, DeliveryState};
pub use events::{DeliveryDetails, EventDetails, EventFilter, EventPage};
pub use inbox::{once, once_within};
pub use lanes::Instance;
pub use outbox::{NotReady, Outbox, SchemaError};
pub use outbox_core::store::{Claim, ClaimedLane, Finished, LaneRef, LaneReport, Next, NextDue, Settled, Unreadable};
pub use replay::Replay;
pub use retention::{Purged, Retention};
pub use route::{NextLook, Routed, Router, Taker};
pub use status::{Postponed, Status, SubscriptionStatus, WorkerStatus};
pub use subscriptions::{RegisterError, Registered};
pub use tx::{NestedTx, SavepointError, Tx};
pub use unit_of_work::{CommitError, TransactionError, TxSource, UnitOfWork, is_transient};
pub use unrouted::{SetAside, Unrouted};
pub use why::Why;
