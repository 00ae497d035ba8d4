use std::{borrow::Cow, collections::BTreeMap, time::Duration};

use chrono::{DateTime, Utc};
use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{Context, InvalidName, PushError, RecordedEvent, check_id, check_name};

/// How deep lists and objects of a payload may stand in each other. PostgreSQL gives up somewhere in the thousands, at a
/// depth that its stack decides. Many consumers read less: serde_json 127 levels, an envelope such as CloudEvents included.
pub const MAX_PAYLOAD_DEPTH: usize = 1000;

/// How many tags an event may have.
pub const MAX_TAGS: usize = 64;

/// A fact about an aggregate, named in the past tense.
///
/// The type's `serde` form is the payload. Renaming a field changes what consumers receive: raise
/// [`SCHEMA_VERSION`](Event::SCHEMA_VERSION) then.
///
/// ```
/// use outbox_core::Event;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct TodoCompleted {
///     todo_id: i64,
/// }
///
/// impl Event for TodoCompleted {
///     const TYPE: &'static str = "todo.completed";
///     const AGGREGATE_TYPE: &'static str = "todo";
///
///     fn aggregate_id(&self) -> String {
///         self.todo_id.to_string()
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "needs `impl outbox_core::Event for {Self}`",
    note = "an event names its `TYPE` (past tense, such as \"todo.completed\") and the aggregate it is about"
)]
pub trait Event: Serialize + DeserializeOwned + Send + 'static {
    /// The event type, past tense: `todo.completed`. A name as [`check_name`] allows it; checked when pushed.
    const TYPE: &'static str;

    /// The type of the aggregate the event is about: `todo`. A name as [`check_name`] allows it.
    const AGGREGATE_TYPE: &'static str;

    /// The version of the payload's shape. Defaults to 1.
    const SCHEMA_VERSION: i32 = 1;

    /// The id of the aggregate. Events of one aggregate are delivered in the order of their commits.
    fn aggregate_id(&self) -> String;
}

/// An event on its way into the collector: the fact plus options of its delivery.
///
/// [`Events::push`](crate::Events::push) takes events directly; build one of these to add tags, a delay, a priority or
/// a maximum of attempts, or for an event whose type is known only at run time.
///
/// ```
/// # use outbox_core::{Event, NewEvent, PushError};
/// # use serde::{Deserialize, Serialize};
/// # #[derive(Serialize, Deserialize)] struct Reminded { todo: i64 }
/// # impl Event for Reminded {
/// #     const TYPE: &'static str = "todo.reminded";
/// #     const AGGREGATE_TYPE: &'static str = "todo";
/// #     fn aggregate_id(&self) -> String { self.todo.to_string() }
/// # }
/// use std::time::Duration;
///
/// let event = NewEvent::of(&Reminded { todo: 7 })?
///     .delay(Duration::from_secs(3600))
///     .max_attempts(1)
///     .tag("channel", "mail")?;
/// # Ok::<(), PushError>(())
/// ```
#[derive(Clone, Debug)]
pub struct NewEvent {
    pub(crate) id: Uuid,
    pub(crate) event_type: Cow<'static, str>,
    pub(crate) schema_version: i32,
    pub(crate) aggregate_type: Cow<'static, str>,
    pub(crate) aggregate_id: String,
    pub(crate) payload: String,
    pub(crate) occurred_at: Option<DateTime<Utc>>,
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) delay: Option<Duration>,
    pub(crate) not_before: Option<DateTime<Utc>>,
    pub(crate) priority: i16,
    pub(crate) max_attempts: Option<u32>,
}

impl NewEvent {
    /// Takes the facts of a typed event.
    ///
    /// # Errors
    ///
    /// [`PushError::Name`] if one of its names or its aggregate id is not valid, [`PushError::Payload`] if it does not
    /// serialize to JSON, [`PushError::PayloadTooDeep`] if it is nested deeper than [`MAX_PAYLOAD_DEPTH`].
    pub fn of<E: Event>(event: &E) -> Result<Self, PushError> {
        let payload = to_json(E::TYPE, event)?;
        Self::build(
            Cow::Borrowed(E::TYPE),
            E::SCHEMA_VERSION,
            Cow::Borrowed(E::AGGREGATE_TYPE),
            event.aggregate_id(),
            payload,
        )
    }

    /// Builds an event whose type is known only at run time. Its schema version is 1.
    ///
    /// # Errors
    ///
    /// As [`NewEvent::of`].
    pub fn dynamic(
        event_type: impl Into<String>,
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        payload: &impl Serialize,
    ) -> Result<Self, PushError> {
        let event_type = event_type.into();
        let payload = to_json(&event_type, payload)?;
        Self::build(Cow::Owned(event_type), 1, Cow::Owned(aggregate_type.into()), aggregate_id.into(), payload)
    }

    fn build(
        event_type: Cow<'static, str>,
        schema_version: i32,
        aggregate_type: Cow<'static, str>,
        aggregate_id: String,
        payload: String,
    ) -> Result<Self, PushError> {
        check_name("event type", &event_type)?;
        check_name("aggregate type", &aggregate_type)?;
        check_id("aggregate id", &aggregate_id)?;
        Ok(Self {
            id: Uuid::now_v7(),
            event_type,
            schema_version,
            aggregate_type,
            aggregate_id,
            payload,
            occurred_at: None,
            tags: BTreeMap::new(),
            delay: None,
            not_before: None,
            priority: 0,
            max_attempts: None,
        })
    }

    /// Sets when the fact happened. Defaults to the moment of the push.
    #[must_use]
    pub fn occurred_at(mut self, at: DateTime<Utc>) -> Self {
        self.occurred_at = Some(at);
        self
    }

    /// Delivers the event no earlier than this long after its commit. Defaults to at once.
    ///
    /// With an order per key, what is pushed later for the same key waits behind it.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// Delivers the event no earlier than this time of the database's clock. The later of this and
    /// [`delay`](Self::delay) counts.
    #[must_use]
    pub fn not_before(mut self, at: DateTime<Utc>) -> Self {
        self.not_before = Some(at);
        self
    }

    /// Gives the event a head start of that many minutes over what is already waiting. Defaults to 0; negative values
    /// count as 0.
    ///
    /// A head start, not a class of its own: low priorities are delayed by it, never starved.
    #[must_use]
    pub fn priority(mut self, priority: i16) -> Self {
        self.priority = priority.max(0);
        self
    }

    /// Sets how often a delivery of this event is tried before it becomes a dead letter; at least 1, at most
    /// 2,147,483,647. Defaults to the retry policy of each subscription.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts.clamp(1, i32::MAX.unsigned_abs()));
        self
    }

    /// Adds a tag that subscriptions can filter and order by.
    ///
    /// # Errors
    ///
    /// [`PushError::Name`] if the tag is not a name as [`check_name`] allows it, or the value is empty or too long;
    /// [`PushError::TooManyTags`] if the event has [`MAX_TAGS`] already.
    pub fn tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Result<Self, PushError> {
        let (name, value) = (name.into(), value.into());
        check_name("tag", &name)?;
        check_id("tag value", &value)?;
        if self.tags.len() >= MAX_TAGS && !self.tags.contains_key(&name) {
            return Err(PushError::TooManyTags { limit: MAX_TAGS });
        }
        self.tags.insert(name, value);
        Ok(self)
    }

    /// The event's id, a UUID of version 7: the same at every delivery, so consumers can recognize repetitions.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// The event type.
    #[must_use]
    pub fn event_type(&self) -> &str {
        &self.event_type
    }

    /// The event as it is stored at this position, with what its request shares. A store calls it, not an application.
    #[must_use]
    pub fn into_recorded(self, position: i64, recorded_at: DateTime<Utc>, context: &Context) -> RecordedEvent {
        RecordedEvent {
            position,
            id: self.id,
            event_type: self.event_type.into_owned(),
            schema_version: self.schema_version,
            aggregate_type: self.aggregate_type.into_owned(),
            aggregate_id: self.aggregate_id,
            payload: self.payload,
            occurred_at: self.occurred_at.unwrap_or(recorded_at),
            recorded_at,
            tenant: context.tenant.clone(),
            actor: context.actor.clone(),
            correlation_id: context.correlation_id.clone(),
            causation_id: context.causation_id.clone(),
            traceparent: context.traceparent.clone(),
            tracestate: context.tracestate.clone(),
            tags: self.tags,
            max_attempts: self.max_attempts,
        }
    }

    /// The version of the payload's shape.
    #[must_use]
    pub fn schema_version(&self) -> i32 {
        self.schema_version
    }

    /// The type of the aggregate.
    #[must_use]
    pub fn aggregate_type(&self) -> &str {
        &self.aggregate_type
    }

    /// The id of the aggregate.
    #[must_use]
    pub fn aggregate_id(&self) -> &str {
        &self.aggregate_id
    }

    /// The payload as JSON text.
    #[must_use]
    pub fn payload(&self) -> &str {
        &self.payload
    }

    /// When the fact happened; set by the push at the latest.
    #[must_use]
    pub fn occurred(&self) -> Option<DateTime<Utc>> {
        self.occurred_at
    }

    /// The tags.
    #[must_use]
    pub fn tags(&self) -> &BTreeMap<String, String> {
        &self.tags
    }

    /// The delay and the absolute time before which the event is not delivered.
    #[must_use]
    pub fn schedule(&self) -> (Option<Duration>, Option<DateTime<Utc>>) {
        (self.delay, self.not_before)
    }

    /// The head start in minutes.
    #[must_use]
    pub fn head_start_minutes(&self) -> i16 {
        self.priority
    }

    /// The event's own maximum of attempts.
    #[must_use]
    pub fn attempts_limit(&self) -> Option<u32> {
        self.max_attempts
    }
}

fn to_json(event_type: &str, payload: &impl Serialize) -> Result<String, PushError> {
    let json = serde_json::to_string(payload)
        .map_err(|source| PushError::Payload { event_type: event_type.to_owned(), source })?;
    if depth(&json) > MAX_PAYLOAD_DEPTH {
        return Err(PushError::PayloadTooDeep { event_type: event_type.to_owned(), limit: MAX_PAYLOAD_DEPTH });
    }
    Ok(json)
}

/// How deep lists and objects stand in each other in a text that is JSON.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let mut bytes = json.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => skip_string(&mut bytes),
            b'[' | b'{' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn skip_string(bytes: &mut impl Iterator<Item = u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => drop(bytes.next()),
            _ => {}
        }
    }
}

/// What [`Events::push`](crate::Events::push) takes: an [`Event`], or a [`NewEvent`] with options.
pub trait IntoNewEvent {
    /// Makes it ready for the collector.
    ///
    /// # Errors
    ///
    /// As [`NewEvent::of`].
    fn into_new_event(self) -> Result<NewEvent, PushError>;
}

impl<E: Event> IntoNewEvent for E {
    fn into_new_event(self) -> Result<NewEvent, PushError> {
        NewEvent::of(&self)
    }
}

impl IntoNewEvent for NewEvent {
    fn into_new_event(self) -> Result<NewEvent, PushError> {
        Ok(self)
    }
}

impl From<InvalidName> for PushError {
    fn from(error: InvalidName) -> Self {
        Self::Name(error)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;

    use super::*;

    fn pushed(payload: &impl Serialize) -> Result<NewEvent, PushError> {
        NewEvent::dynamic("OrderCreated", "order", "1", payload)
    }

    /// Lists and objects in turn, with brackets in their texts that count for nothing.
    fn nested(depth: usize) -> Box<RawValue> {
        let (open, close): (String, String) =
            (0..depth).map(|n| if n % 2 == 0 { ("[", "]") } else { (r#"{"[{\"":"#, "}") }).unzip();
        let close: String = close.chars().rev().collect();
        RawValue::from_string(format!(r#"{open}"]}}\\\""{close}"#)).unwrap()
    }

    #[test]
    fn a_payload_that_a_database_may_not_store_is_refused() {
        assert!(pushed(&nested(MAX_PAYLOAD_DEPTH)).is_ok());
        for depth in [MAX_PAYLOAD_DEPTH + 1, 6000] {
            let refused = pushed(&nested(depth));
            assert!(matches!(refused, Err(PushError::PayloadTooDeep { limit: MAX_PAYLOAD_DEPTH, .. })), "{depth}");
        }
    }

    #[test]
    fn the_tags_of_an_event_are_bounded() {
        let tagged = (0..MAX_TAGS).try_fold(pushed(&()).unwrap(), |event, n| event.tag(format!("t{n}"), "v")).unwrap();
        let again = tagged.tag("t0", "w").unwrap();
        assert_eq!((again.tags().len(), again.tags()["t0"].as_str()), (MAX_TAGS, "w"));
        assert!(matches!(again.tag("one-more", "v"), Err(PushError::TooManyTags { limit: MAX_TAGS })));
    }

    proptest! {
        #[test]
        fn any_payload_has_the_depth_that_a_parser_sees(text in r#"[\[\]{}",:\\\\a1 ]{0,300}"#, strings in prop::collection::vec(any::<String>(), 0..4)) {
            // Not JSON: it must not panic.
            depth(&text);
            let flat = serde_json::to_string(&strings).unwrap();
            prop_assert_eq!(depth(&flat), 1);
        }
    }
}
