use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use crate::{Actor, Clock, Context, IntoNewEvent, InvalidName, NewEvent, SystemClock, check_id};

/// How much one request may push.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    events: usize,
    bytes: usize,
    payload: usize,
    payload_warning: usize,
}

impl Limits {
    const DEFAULT: Self =
        Self { events: 20_000, bytes: 64 * 1024 * 1024, payload: 1024 * 1024, payload_warning: 64 * 1024 };

    /// Sets the number of events. Defaults to 20,000.
    #[must_use]
    pub fn events(mut self, events: usize) -> Self {
        self.events = events;
        self
    }

    /// Sets the size of all payloads and tags together, in bytes. Defaults to 64 MiB.
    #[must_use]
    pub fn bytes(mut self, bytes: usize) -> Self {
        self.bytes = bytes;
        self
    }

    /// Sets the size of one payload, in bytes of JSON. Defaults to 1 MiB.
    #[must_use]
    pub fn payload(mut self, bytes: usize) -> Self {
        self.payload = bytes;
        self
    }

    /// Sets the size from which a payload is accepted with a warning in the log, in bytes. Defaults to 64 KiB.
    #[must_use]
    pub fn payload_warning(mut self, bytes: usize) -> Self {
        self.payload_warning = bytes;
        self
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Why an event was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The request has ended: its events were flushed or dropped.
    #[error("the request has ended; an event must be pushed before the response is ready")]
    Closed,
    /// A name or id is not valid.
    #[error(transparent)]
    Name(InvalidName),
    /// The event does not serialize to JSON.
    #[error("the payload of {event_type:?} does not serialize to JSON")]
    Payload {
        /// The event type.
        event_type: String,
        /// What the serializer said.
        source: serde_json::Error,
    },
    /// One payload is nested too deep.
    #[error(
        "the payload of {event_type:?} has lists and objects that stand more than {limit} deep in each other; \
         flatten it"
    )]
    PayloadTooDeep {
        /// The event type.
        event_type: String,
        /// The limit.
        limit: usize,
    },
    /// The event has as many tags as it may.
    #[error("an event may have at most {limit} tags; put data into the payload")]
    TooManyTags {
        /// The limit.
        limit: usize,
    },
    /// One payload is over the limit.
    #[error(
        "the payload of {event_type:?} has {size} bytes, more than the limit of {limit}; store the large part \
         elsewhere and push a reference to it"
    )]
    PayloadTooLarge {
        /// The event type.
        event_type: String,
        /// The payload's size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The request has pushed as many events as it may.
    #[error("a request may push at most {limit} events")]
    TooManyEvents {
        /// The limit.
        limit: usize,
    },
    /// The request's payloads and tags together are over the limit.
    #[error("the payloads and tags of one request may have at most {limit} bytes together")]
    TooManyBytes {
        /// The limit in bytes.
        limit: usize,
    },
}

/// The collector of one request: handlers push events, the commit flushes them.
///
/// A cheap handle; clones push into the same collector. Nothing is written before the handler has answered with a
/// success, and nothing stays behind afterwards: the flush moves the events out and closes the collector.
#[derive(Clone, Debug)]
pub struct Events {
    shared: Arc<Mutex<Collector>>,
}

#[derive(Debug)]
struct Collector {
    events: Vec<NewEvent>,
    bytes: usize,
    limits: Limits,
    context: Context,
    clock: Arc<dyn Clock>,
    closed: bool,
}

/// The events of a request, taken out of its collector.
#[derive(Debug, Default)]
pub struct Batch {
    /// The events in the order of their pushes.
    pub events: Vec<NewEvent>,
    /// What they share.
    pub context: Context,
}

impl Events {
    /// Opens an empty collector.
    #[must_use]
    pub fn new(limits: Limits, context: Context) -> Self {
        Self::with_clock(limits, context, Arc::new(SystemClock))
    }

    /// Opens an empty collector that takes the time of pushes from `clock`.
    #[must_use]
    pub fn with_clock(limits: Limits, context: Context, clock: Arc<dyn Clock>) -> Self {
        let collector = Collector { events: Vec::new(), bytes: 0, limits, context, clock, closed: false };
        Self { shared: Arc::new(Mutex::new(collector)) }
    }

    /// Adds an event and returns its id.
    ///
    /// # Errors
    ///
    /// [`PushError`] if a name or a part of the context is not valid, the payload does not serialize, a [limit](Limits) is reached, or the
    /// request has ended. The collector is unchanged then.
    pub fn push(&self, event: impl IntoNewEvent) -> Result<Uuid, PushError> {
        let mut event = event.into_new_event()?;
        let mut collector = self.lock();
        let limits = collector.limits;
        let size = event.payload.len();
        if collector.closed {
            return Err(PushError::Closed);
        }
        collector.context.check()?;
        if size > limits.payload {
            return Err(PushError::PayloadTooLarge {
                event_type: event.event_type.into_owned(),
                size,
                limit: limits.payload,
            });
        }
        if collector.events.len() >= limits.events {
            return Err(PushError::TooManyEvents { limit: limits.events });
        }
        let weight = weight(&event);
        if collector.bytes + weight > limits.bytes {
            return Err(PushError::TooManyBytes { limit: limits.bytes });
        }
        if size > limits.payload_warning {
            tracing::warn!(event_type = %event.event_type, size, "large event payload; prefer a reference to the data");
        }
        event.occurred_at.get_or_insert_with(|| collector.clock.now());
        let id = event.id;
        collector.bytes += weight;
        collector.events.push(event);
        Ok(id)
    }

    /// Sets the tenant of all events of this request.
    ///
    /// # Errors
    ///
    /// [`PushError::Name`] if it is empty or too long, [`PushError::Closed`] if the request has ended.
    pub fn set_tenant(&self, tenant: impl Into<String>) -> Result<(), PushError> {
        let tenant = tenant.into();
        check_id("tenant", &tenant)?;
        self.set(|context| context.tenant = Some(tenant))
    }

    /// Sets who caused the events of this request.
    ///
    /// # Errors
    ///
    /// [`PushError::Name`] if its kind is not a name or its id is empty or too long, [`PushError::Closed`] if the
    /// request has ended.
    pub fn set_actor(&self, actor: Actor) -> Result<(), PushError> {
        actor.check()?;
        self.set(|context| context.actor = Some(actor))
    }

    /// Sets the correlation id of all events of this request.
    ///
    /// # Errors
    ///
    /// [`PushError::Name`] if it is empty or too long, [`PushError::Closed`] if the request has ended.
    pub fn set_correlation_id(&self, id: impl Into<String>) -> Result<(), PushError> {
        let id = id.into();
        check_id("correlation id", &id)?;
        self.set(|context| context.correlation_id = Some(id))
    }

    fn set(&self, change: impl FnOnce(&mut Context)) -> Result<(), PushError> {
        let mut collector = self.lock();
        if collector.closed {
            return Err(PushError::Closed);
        }
        change(&mut collector.context);
        Ok(())
    }

    /// The number of events pushed so far; 0 after the end of the request.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().events.len()
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops what was pushed after the first `len` events: what a savepoint does when it rolls back.
    pub fn truncate(&self, len: usize) {
        let mut collector = self.lock();
        collector.events.truncate(len);
        collector.bytes = collector.events.iter().map(weight).sum();
    }

    /// Takes the events out and closes the collector: later pushes return [`PushError::Closed`].
    #[must_use]
    pub fn close(&self) -> Batch {
        let mut collector = self.lock();
        collector.closed = true;
        collector.bytes = 0;
        Batch { events: std::mem::take(&mut collector.events), context: std::mem::take(&mut collector.context) }
    }

    // A panic while pushing leaves the collector whole: the event is appended last.
    fn lock(&self) -> MutexGuard<'_, Collector> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What an event counts for in the bytes of its request.
fn weight(event: &NewEvent) -> usize {
    event.payload.len() + event.tags.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(payload: &str) -> NewEvent {
        NewEvent::dynamic("todo.created", "todo", "1", &json!(payload)).unwrap()
    }

    fn events(limits: Limits) -> Events {
        Events::new(limits, Context::default())
    }

    #[test]
    fn a_payload_at_the_limit_is_taken_and_one_above_is_refused() {
        let events = events(Limits::default().payload(10));
        events.push(event("12345678")).unwrap();
        let error = events.push(event("123456789")).unwrap_err();
        assert!(matches!(error, PushError::PayloadTooLarge { size: 11, limit: 10, .. }), "{error}");
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn the_number_of_events_is_bounded() {
        let events = events(Limits::default().events(2));
        events.push(event("a")).unwrap();
        events.push(event("b")).unwrap();
        assert!(matches!(events.push(event("c")), Err(PushError::TooManyEvents { limit: 2 })));
    }

    #[test]
    fn all_payloads_together_are_bounded_and_a_savepoint_gives_room_back() {
        let events = events(Limits::default().bytes(6));
        events.push(event("a")).unwrap();
        events.push(event("b")).unwrap();
        assert!(matches!(events.push(event("c")), Err(PushError::TooManyBytes { limit: 6 })));
        events.truncate(1);
        events.push(event("d")).unwrap();
        let batch = events.close();
        let payloads: Vec<_> = batch.events.iter().map(NewEvent::payload).collect();
        assert_eq!(payloads, [r#""a""#, r#""d""#]);
    }

    #[test]
    fn tags_count_as_bytes_of_the_request() {
        let events = events(Limits::default().bytes(10));
        events.push(event("a").tag("name", "value").unwrap()).unwrap_err();
        events.push(event("a").tag("name", "val").unwrap()).unwrap();
        assert!(matches!(events.push(event("b")), Err(PushError::TooManyBytes { limit: 10 })));
        events.truncate(0);
        events.push(event("b")).unwrap();
    }

    #[test]
    fn pushing_after_the_end_is_refused() {
        let events = events(Limits::default());
        events.push(event("a")).unwrap();
        assert_eq!(events.close().events.len(), 1);
        assert!(matches!(events.push(event("b")), Err(PushError::Closed)));
        assert!(events.is_empty());
        assert!(events.close().events.is_empty());
    }

    #[test]
    fn an_event_type_with_bad_characters_is_refused() {
        let error = NewEvent::dynamic("Todo Created", "todo", "1", &json!(1)).unwrap_err();
        assert!(error.to_string().contains("\"Todo Created\" is not a valid name"), "{error}");
    }
}
