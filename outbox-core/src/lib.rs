//! The vocabulary of a transactional outbox: events, the collector a request pushes them into, subscriptions, retry
//! policy, delivery outcomes.
//!
//! This crate does no IO. It knows neither a web framework nor a database nor a job runner, so domain code that only
//! defines and pushes events depends on this crate alone.
//!
//! The feature `testing` (off by default) adds `testing`, helpers for tests of applications.
//!
//! ```
//! use outbox_core::{Context, Event, Events, Limits};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct OrderPlaced {
//!     order_id: i64,
//!     total_cents: i64,
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
//! # fn main() -> Result<(), outbox_core::PushError> {
//! let events = Events::new(Limits::default(), Context::default());
//! events.push(OrderPlaced { order_id: 7, total_cents: 1200 })?;
//! assert_eq!(events.len(), 1);
//! # Ok(())
//! # }
//! ```

mod attempt_log;
mod change;
mod clock;
mod collector;
mod context;
mod delivery;
mod event;
mod name;
mod news;
mod publisher;
mod record;
mod retry;
pub mod store;
mod subscription;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod text;

pub use attempt_log::{AttemptLog, LoggedAttempt};
pub use change::Change;
pub use clock::{Clock, SystemClock};
pub use collector::{Batch, Events, Limits, PushError};
pub use context::{Actor, Context};
pub use delivery::{Delivery, DeliveryError, Outcome, Reason};
pub use event::{Event, IntoNewEvent, MAX_PAYLOAD_DEPTH, MAX_TAGS, NewEvent};
pub use name::{
    InvalidName, MAX_ID_BYTES, MAX_NAME_LENGTH, MAX_SUBSCRIPTION_NAME_LENGTH, MAX_TRACESTATE_BYTES, check_id,
    check_name, check_subscription_name,
};
pub use publisher::{LogPublisher, Publisher};
pub use record::{DecodeError, RecordedEvent};
pub use retry::{InvalidPolicy, Jitter, RetryPolicy};
pub use subscription::{
    AfterDeadLetter, DeliveryLimits, Filter, InvalidLimit, InvalidPattern, Ordering, StartPosition, Subject,
    Subscription, TypePattern,
};
pub use text::{error_text, one_line};
