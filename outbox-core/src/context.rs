use serde::{Deserialize, Serialize};

use crate::{InvalidName, check_id, check_name};

/// Who or what caused an event, for example `USER` `42` or `SYSTEM.IMPORT` `nightly`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The kind: `user`, `system.import`, `system.automation`, …; a name as [`check_name`] allows it.
    pub kind: String,
    /// The id within its kind.
    pub id: String,
}

impl Actor {
    /// Names an actor.
    ///
    /// # Errors
    ///
    /// [`InvalidName`] if the kind is not a name or the id is empty or too long.
    pub fn new(kind: impl Into<String>, id: impl Into<String>) -> Result<Self, InvalidName> {
        let (kind, id) = (kind.into(), id.into());
        check_name("actor kind", &kind)?;
        check_id("actor id", &id)?;
        Ok(Self { kind, id })
    }
}

/// What all events of one request share.
///
/// Set by the layer from the request (correlation id, trace context), by the application's own middleware or by the
/// handler through [`Events`](crate::Events) (tenant, actor). Applied when the events are flushed, so a tenant that is
/// known only after the first push still reaches every event of the request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Context {
    /// The tenant the events belong to.
    pub tenant: Option<String>,
    /// Who caused the events.
    pub actor: Option<Actor>,
    /// Groups everything that one outside request led to.
    pub correlation_id: Option<String>,
    /// The id of the event or command that led to these events.
    pub causation_id: Option<String>,
    /// The W3C `traceparent` of the request.
    pub traceparent: Option<String>,
    /// The W3C `tracestate` of the request.
    pub tracestate: Option<String>,
}
