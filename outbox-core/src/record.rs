use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, de::Error as _, ser::Error as _};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{Actor, Event};

/// An event that is stored: an immutable fact with its position.
///
/// Serializes to one JSON object, with the payload as JSON inside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecordedEvent {
    /// Names the event's row: drawn when it was inserted, so it is higher than that of every event that was committed
    /// before. Events that were under way side by side may be delivered in another order, and positions have gaps.
    pub position: i64,
    /// The event's id, the same at every delivery.
    pub id: Uuid,
    /// The event type, for example `todo.completed`.
    pub event_type: String,
    /// The version of the payload's shape.
    pub schema_version: i32,
    /// The type of the aggregate.
    pub aggregate_type: String,
    /// The id of the aggregate.
    pub aggregate_id: String,
    /// The payload as JSON text, byte for byte as it was pushed.
    #[serde(serialize_with = "as_json", deserialize_with = "from_json")]
    pub payload: String,
    /// When the fact happened, by the clock of the process that pushed it.
    pub occurred_at: DateTime<Utc>,
    /// When it was stored, by the database's clock.
    pub recorded_at: DateTime<Utc>,
    /// The tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Who caused it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actor: Option<Actor>,
    /// Groups everything that one outside request led to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// The id of the event or command that led to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causation_id: Option<String>,
    /// The W3C `traceparent` of the request that pushed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The W3C `tracestate` of the request that pushed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// The tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// The event's own maximum of attempts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
}

/// Why a recorded event is not the expected typed event.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// It has another type or schema version.
    #[error("expected {expected} version {expected_version}, found {found} version {found_version}")]
    Mismatch {
        /// The type that was asked for.
        expected: &'static str,
        /// The version that was asked for.
        expected_version: i32,
        /// The recorded type.
        found: String,
        /// The recorded version.
        found_version: i32,
    },
    /// The payload does not have the shape of the type.
    #[error("the payload of {event_type} version {schema_version} cannot be decoded")]
    Payload {
        /// The event type.
        event_type: String,
        /// The version of its shape.
        schema_version: i32,
        /// What the deserializer said.
        source: serde_json::Error,
    },
}

fn as_json<S: serde::Serializer>(payload: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let payload: &RawValue = serde_json::from_str(payload).map_err(S::Error::custom)?;
    payload.serialize(serializer)
}

fn from_json<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let payload = Box::<RawValue>::deserialize(deserializer).map_err(D::Error::custom)?;
    Ok(payload.get().to_owned())
}

impl RecordedEvent {
    /// Decodes the payload as `E`.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] if the event has another type or version, or a payload of another shape.
    pub fn decode<E: Event>(&self) -> Result<E, DecodeError> {
        if self.event_type != E::TYPE || self.schema_version != E::SCHEMA_VERSION {
            return Err(DecodeError::Mismatch {
                expected: E::TYPE,
                expected_version: E::SCHEMA_VERSION,
                found: self.event_type.clone(),
                found_version: self.schema_version,
            });
        }
        serde_json::from_str(&self.payload).map_err(|source| DecodeError::Payload {
            event_type: self.event_type.clone(),
            schema_version: self.schema_version,
            source,
        })
    }
}
