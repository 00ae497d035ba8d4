use serde::{Deserialize, Serialize};

use crate::{InvalidName, check_id, check_name, name::MAX_TRACESTATE_BYTES};

/// Who or what caused an event, for example `USER` `42` or `SYSTEM.IMPORT` `nightly`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// The kind: `USER`, `SYSTEM.IMPORT`, `system.automation`, …; a name as [`check_name`] allows it.
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
        let actor = Self { kind: kind.into(), id: id.into() };
        actor.check()?;
        Ok(actor)
    }

    pub(crate) fn check(&self) -> Result<(), InvalidName> {
        check_name("actor kind", &self.kind)?;
        check_id("actor id", &self.id)
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

impl Context {
    /// Replaces each field that `over` has. `tracestate` belongs to its `traceparent`: both come from one of the two.
    pub fn lay_over(&mut self, over: Self) {
        if over.traceparent.is_some() {
            self.traceparent = over.traceparent;
            self.tracestate = over.tracestate;
        }
        self.tenant = over.tenant.or(self.tenant.take());
        self.actor = over.actor.or(self.actor.take());
        self.correlation_id = over.correlation_id.or(self.correlation_id.take());
        self.causation_id = over.causation_id.or(self.causation_id.take());
    }

    /// The fields can be set to anything; what no database stores is found before it gets there.
    pub(crate) fn check(&self) -> Result<(), InvalidName> {
        for (what, id) in [
            ("tenant", &self.tenant),
            ("correlation id", &self.correlation_id),
            ("causation id", &self.causation_id),
            ("traceparent", &self.traceparent),
        ] {
            id.as_deref().map_or(Ok(()), |id| check_id(what, id))?;
        }
        self.actor.as_ref().map_or(Ok(()), Actor::check)?;
        match self.tracestate.as_deref() {
            Some(state) if state.is_empty() || state.len() > MAX_TRACESTATE_BYTES || state.contains('\0') => {
                Err(InvalidName::Tracestate)
            }
            _ => Ok(()),
        }
    }
}
