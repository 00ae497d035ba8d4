//! What the application tells the world.

use outbox_core::Event;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::poison::Kind;

/// One of the `n` events of an op, or an extra one of its mode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OrderPlaced {
    pub(crate) op: String,
    /// Which of the op's events: 0 … n − 1, and from n on the extra ones.
    pub(crate) i: i64,
    pub(crate) key: String,
    /// The key's running number; extra events have none.
    pub(crate) seq: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
    /// JSON as it was sent, digit for digit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) raw: Option<Box<RawValue>>,
}

impl Event for OrderPlaced {
    const TYPE: &'static str = "order.placed";
    const AGGREGATE_TYPE: &'static str = "order";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}

/// An event that harms its handler.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct OrderPoisoned {
    pub(crate) op: String,
    pub(crate) key: String,
    pub(crate) kind: Kind,
}

impl Event for OrderPoisoned {
    const TYPE: &'static str = "order.poisoned";
    const AGGREGATE_TYPE: &'static str = "order";

    fn aggregate_id(&self) -> String {
        self.key.clone()
    }
}
