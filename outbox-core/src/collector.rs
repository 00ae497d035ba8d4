use std::{
    cell::RefCell,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

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
    /// The savepoint of this collector has ended: its events were kept or dropped.
    #[error(
        "the savepoint of this collector has ended; push before its closure answers, or into the request's collector"
    )]
    SavepointEnded,
    /// The collector around a savepoint was used in the savepoint's closure, where its events would outlive a rollback.
    #[error("this collector is not the savepoint's; in the closure, push into the collector that the closure is given")]
    AroundSavepoint,
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
///
/// A savepoint has a collector of its own, [inside](Self::inside) of this one. Its `Debug` shows counts, no payloads.
#[derive(Clone)]
pub struct Events {
    shared: Arc<Mutex<Collector>>,
    savepoint: u64,
}

struct Collector {
    /// What the request has pushed, then one for each open savepoint.
    buffers: Vec<Buffer>,
    savepoints: u64,
    bytes: usize,
    limits: Limits,
    context: Context,
    clock: Arc<dyn Clock>,
    closed: bool,
}

struct Buffer {
    savepoint: u64,
    around: u64,
    events: Vec<NewEvent>,
}

/// The savepoint that is the request itself.
const REQUEST: u64 = 0;

thread_local! {
    /// The collectors, each with its savepoint, in which a savepoint is at work on this thread right now.
    static AROUND: RefCell<Vec<(usize, u64)>> = const { RefCell::new(Vec::new()) };
}

/// The events of a request, taken out of its collector. Its `Debug` shows their number.
#[derive(Default)]
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
        let buffers = vec![Buffer { savepoint: REQUEST, around: REQUEST, events: Vec::new() }];
        let collector = Collector { buffers, savepoints: 0, bytes: 0, limits, context, clock, closed: false };
        Self { shared: Arc::new(Mutex::new(collector)), savepoint: REQUEST }
    }

    /// Adds an event and returns its id.
    ///
    /// # Errors
    ///
    /// [`PushError`] if a name or a part of the context is not valid, the payload does not serialize, a [limit](Limits)
    /// is reached, the request or the collector's savepoint has ended, or a savepoint's closure uses the collector around
    /// it. The collector is unchanged then.
    pub fn push(&self, event: impl IntoNewEvent) -> Result<Uuid, PushError> {
        let mut event = event.into_new_event()?;
        if self.is_around() {
            return Err(PushError::AroundSavepoint);
        }
        let mut collector = self.lock();
        let limits = collector.limits;
        let size = event.payload.len();
        if collector.closed {
            return Err(PushError::Closed);
        }
        if collector.buffer(self.savepoint).is_none() {
            return Err(PushError::SavepointEnded);
        }
        collector.context.check()?;
        if size > limits.payload {
            return Err(PushError::PayloadTooLarge {
                event_type: event.event_type.into_owned(),
                size,
                limit: limits.payload,
            });
        }
        if collector.len() >= limits.events {
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
        if let Some(buffer) = collector.buffer(self.savepoint) {
            buffer.events.push(event);
            collector.bytes += weight;
        }
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

    /// Replaces what the events of this request share by each field that `over` has, see [`Context::lay_over`].
    ///
    /// # Errors
    ///
    /// [`PushError::Name`] if a field of `over` is not valid, [`PushError::Closed`] if the request has ended.
    pub fn lay_over(&self, over: Context) -> Result<(), PushError> {
        over.check()?;
        self.set(|context| context.lay_over(over))
    }

    fn set(&self, change: impl FnOnce(&mut Context)) -> Result<(), PushError> {
        let mut collector = self.lock();
        if collector.closed {
            return Err(PushError::Closed);
        }
        change(&mut collector.context);
        Ok(())
    }

    /// The number of events pushed so far, in savepoints too unless they were rolled back; 0 after the end of the request.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether nothing was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Opens the collector of a savepoint, for stores. What is pushed into it belongs to the savepoint alone: it joins the
    /// events around it with [`keep`](Self::keep) and is gone with [`discard`](Self::discard).
    #[must_use]
    pub fn open_savepoint(&self) -> Self {
        let mut collector = self.lock();
        collector.savepoints += 1;
        let savepoint = collector.savepoints;
        collector.buffers.push(Buffer { savepoint, around: self.savepoint, events: Vec::new() });
        Self { shared: self.shared.clone(), savepoint }
    }

    /// Ends the collector of a savepoint that holds: its events come after those that are around it. Does nothing to the
    /// request's own.
    pub fn keep(&self) {
        let mut collector = self.lock();
        if let Some(Buffer { around, events, .. }) = collector.take(self.savepoint)
            && let Some(buffer) = collector.buffer(around)
        {
            buffer.events.extend(events);
        }
    }

    /// Ends the collector of a savepoint that was rolled back: its events are gone, and so are those of savepoints inside
    /// of it. Does nothing to the request's own.
    pub fn discard(&self) {
        let mut collector = self.lock();
        let mut gone = vec![self.savepoint];
        while let Some(savepoint) = gone.pop() {
            let inside = collector.buffers.iter().filter(|each| each.around == savepoint && each.savepoint != REQUEST);
            gone.extend(inside.map(|each| each.savepoint).collect::<Vec<_>>());
            let events = collector.take(savepoint).map(|buffer| buffer.events).unwrap_or_default();
            collector.bytes -= events.iter().map(weight).sum::<usize>();
        }
    }

    /// Runs one poll of what a savepoint contains, for stores. Meanwhile the collectors around it refuse what this thread
    /// pushes into them: it would outlive a rollback of the savepoint.
    pub fn inside<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Leave;
        impl Drop for Leave {
            fn drop(&mut self) {
                AROUND.with_borrow_mut(Vec::pop);
            }
        }
        let around = self.lock().buffer(self.savepoint).map_or(REQUEST, |buffer| buffer.around);
        AROUND.with_borrow_mut(|all| all.push((self.address(), around)));
        let _leave = Leave;
        work()
    }

    /// Whether this thread is [inside](Self::inside) of a savepoint that was opened in this collector.
    #[must_use]
    pub fn is_around(&self) -> bool {
        AROUND.with_borrow(|all| all.contains(&(self.address(), self.savepoint)))
    }

    /// Takes the events out and closes the collector: later pushes return [`PushError::Closed`]. What is in savepoints that
    /// have not ended is gone.
    #[must_use]
    pub fn close(&self) -> Batch {
        let mut collector = self.lock();
        collector.closed = true;
        collector.bytes = 0;
        let events = collector.buffers.drain(..).next().map(|request| request.events).unwrap_or_default();
        Batch { events, context: std::mem::take(&mut collector.context) }
    }

    fn address(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    // A panic while pushing leaves the collector whole: the event is appended last.
    fn lock(&self) -> MutexGuard<'_, Collector> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector {
    fn len(&self) -> usize {
        self.buffers.iter().map(|buffer| buffer.events.len()).sum()
    }

    fn buffer(&mut self, savepoint: u64) -> Option<&mut Buffer> {
        self.buffers.iter_mut().find(|buffer| buffer.savepoint == savepoint)
    }

    fn take(&mut self, savepoint: u64) -> Option<Buffer> {
        let found = self.buffers.iter().position(|buffer| buffer.savepoint == savepoint && savepoint != REQUEST);
        found.map(|index| self.buffers.remove(index))
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let collector = self.lock();
        let (events, bytes, closed) = (collector.len(), collector.bytes, collector.closed);
        f.debug_struct("Events").field("events", &events).field("bytes", &bytes).field("closed", &closed).finish()
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("events", &self.events.len()).finish_non_exhaustive()
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
        let savepoint = events.open_savepoint();
        savepoint.push(event("b")).unwrap();
        assert!(matches!(events.push(event("c")), Err(PushError::TooManyBytes { limit: 6 })));
        savepoint.discard();
        events.push(event("d")).unwrap();
        let batch = events.close();
        let payloads: Vec<_> = batch.events.iter().map(NewEvent::payload).collect();
        assert_eq!(payloads, [r#""a""#, r#""d""#]);
    }

    #[test]
    fn tags_count_as_bytes_of_the_request() {
        let events = events(Limits::default().bytes(10));
        events.push(event("a").tag("name", "value").unwrap()).unwrap_err();
        let savepoint = events.open_savepoint();
        savepoint.push(event("a").tag("name", "val").unwrap()).unwrap();
        assert!(matches!(events.push(event("b")), Err(PushError::TooManyBytes { limit: 10 })));
        savepoint.discard();
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
    fn a_savepoint_keeps_its_events_apart_until_it_ends() {
        let events = events(Limits::default());
        let (kept, dropped) = (events.open_savepoint(), events.open_savepoint());
        let inner = dropped.open_savepoint();
        for (collector, name) in [(&kept, "kept"), (&dropped, "dropped"), (&inner, "inner"), (&events, "request")] {
            collector.push(event(name)).unwrap();
        }
        assert_eq!(events.len(), 4);
        kept.keep();
        dropped.discard();
        for ended in [kept, dropped, inner] {
            assert!(matches!(ended.push(event("late")), Err(PushError::SavepointEnded)));
        }
        assert_eq!(events.len(), 2);
        let payloads: Vec<_> = events.close().events.iter().map(|event| event.payload().to_owned()).collect();
        assert_eq!(payloads, [r#""request""#, r#""kept""#]);
    }

    #[test]
    fn collectors_around_a_savepoint_are_refused_inside_of_it() {
        let (events, stranger) = (events(Limits::default()), events(Limits::default()));
        let outer = events.open_savepoint();
        let inner = outer.open_savepoint();
        outer.inside(|| {
            inner.inside(|| {
                assert!(matches!(events.push(event("a")), Err(PushError::AroundSavepoint)));
                assert!(matches!(outer.push(event("a")), Err(PushError::AroundSavepoint)));
                inner.push(event("inner")).unwrap();
                stranger.push(event("stranger")).unwrap();
            });
            outer.push(event("outer")).unwrap();
        });
        events.push(event("request")).unwrap();
        assert_eq!((events.len(), stranger.len()), (3, 1));
    }

    #[test]
    fn a_collector_in_a_log_shows_no_payload() {
        let events = events(Limits::default());
        events.push(event("secret")).unwrap();
        assert_eq!(format!("{events:?}"), "Events { events: 1, bytes: 8, closed: false }");
        assert!(!format!("{:?}", events.close()).contains("secret"));
    }

    #[test]
    fn an_event_type_with_bad_characters_is_refused() {
        let error = NewEvent::dynamic("Todo Created", "todo", "1", &json!(1)).unwrap_err();
        assert!(error.to_string().contains("\"Todo Created\" is not a valid name"), "{error}");
    }
}
