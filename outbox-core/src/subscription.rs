use std::{collections::BTreeMap, fmt, str::FromStr};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{InvalidName, NewEvent, RecordedEvent, RetryPolicy, check_id, check_name, check_subscription_name};

/// The durable, named interest of one destination in some events.
///
/// The name is the identity: a process that registers the same name again changes filter and ordering of the
/// subscription that exists, and continues where it was.
///
/// ```
/// use outbox_core::{Ordering, StartPosition, Subscription};
///
/// let billing = Subscription::new("billing")?
///     .events(["order.*", "customer.deleted"])?
///     .ordering(Ordering::Aggregate)
///     .start(StartPosition::Beginning);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Subscription {
    name: String,
    filter: Filter,
    ordering: Ordering,
    retry: Option<RetryPolicy>,
    start: StartPosition,
    after_dead_letter: AfterDeadLetter,
    limits: DeliveryLimits,
}

/// How much of a subscription is delivered at once; `None` where there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct DeliveryLimits {
    /// Deliveries under way in each process; see [`Subscription::concurrency`].
    pub concurrency: Option<usize>,
    /// The same of one tenant; see [`Subscription::concurrency_per_tenant`].
    pub concurrency_per_tenant: Option<usize>,
    /// The same in all processes together; see [`Subscription::fleet_concurrency`].
    pub fleet_concurrency: Option<usize>,
    /// Deliveries that each process begins in a second; see [`Subscription::rate`].
    pub rate: Option<f64>,
    /// The same of all processes together; see [`Subscription::fleet_rate`].
    pub fleet_rate: Option<f64>,
}

/// What the rest of a key does after one of its events became a dead letter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AfterDeadLetter {
    /// It goes on without the event.
    #[default]
    Continue,
    /// It waits until an operator replays or discards the dead letter. Other keys go on.
    Hold,
}

/// A limit of a subscription that makes no sense; the text says why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct InvalidLimit(&'static str);

impl Subscription {
    /// Names a subscription to all events, ordered per aggregate, from now on.
    ///
    /// # Errors
    ///
    /// [`InvalidName`] unless [`check_subscription_name`] allows the name.
    pub fn new(name: impl Into<String>) -> Result<Self, InvalidName> {
        let name = name.into();
        check_subscription_name(&name)?;
        Ok(Self {
            name,
            filter: Filter::default(),
            ordering: Ordering::default(),
            retry: None,
            start: StartPosition::default(),
            after_dead_letter: AfterDeadLetter::default(),
            limits: DeliveryLimits::default(),
        })
    }

    /// Takes only events of these types: exact (`todo.created`, `OrderCreated`), by a prefix that ends with a separator
    /// (`todo.*`, `EMBED_*`, `shop:order/*`) or all (`*`). Defaults to all.
    ///
    /// # Errors
    ///
    /// [`InvalidPattern`] if a pattern is none of these.
    pub fn events<'a>(mut self, patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, InvalidPattern> {
        self.filter.types = patterns.into_iter().map(str::parse).collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// Takes only events that carry all of these tags, whatever their values.
    #[must_use]
    pub fn required_tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.filter.required_tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Takes only events that carry at least one of these tags.
    #[must_use]
    pub fn any_of_tags<T: Into<String>>(mut self, tags: impl IntoIterator<Item = T>) -> Self {
        self.filter.any_of_tags = tags.into_iter().map(Into::into).collect();
        self
    }

    /// Takes only events of one tenant.
    ///
    /// # Errors
    ///
    /// [`InvalidName::Id`] if it is empty or too long.
    pub fn tenant(mut self, tenant: impl Into<String>) -> Result<Self, InvalidName> {
        let tenant = tenant.into();
        check_id("tenant", &tenant)?;
        self.filter.tenant = Some(tenant);
        Ok(self)
    }

    /// Sets which events wait for each other. Defaults to [`Ordering::Aggregate`].
    #[must_use]
    pub fn ordering(mut self, ordering: Ordering) -> Self {
        self.ordering = ordering;
        self
    }

    /// Sets when and how often failed deliveries are tried again. Defaults to the policy of the
    /// [publisher](crate::Publisher::retry_policy), and for handlers to [`RetryPolicy::default`].
    #[must_use]
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = Some(retry);
        self
    }

    /// Sets where a subscription that does not exist yet begins. Defaults to [`StartPosition::Now`].
    #[must_use]
    pub fn start(mut self, start: StartPosition) -> Self {
        self.start = start;
        self
    }

    /// Sets what the rest of a key does after a dead letter. Defaults to [`AfterDeadLetter::Continue`].
    #[must_use]
    pub fn after_dead_letter(mut self, policy: AfterDeadLetter) -> Self {
        self.after_dead_letter = policy;
        self
    }

    /// Sets how many deliveries of this subscription each process has under way. Defaults to the worker's concurrency.
    ///
    /// # Errors
    ///
    /// [`InvalidLimit`] if it is 0 or more than 10,000.
    pub fn concurrency(mut self, deliveries: usize) -> Result<Self, InvalidLimit> {
        self.limits.concurrency = Some(checked_concurrency(deliveries)?);
        Ok(self)
    }

    /// Sets how many deliveries of one tenant each process has under way. Defaults to no limit.
    ///
    /// Without it tenants share what there is: one with deliveries under way comes behind those that have fewer, and while
    /// there are several, none takes the last fifth. Events without a tenant share as one more.
    ///
    /// # Errors
    ///
    /// [`InvalidLimit`] if it is 0 or more than 10,000.
    pub fn concurrency_per_tenant(mut self, deliveries: usize) -> Result<Self, InvalidLimit> {
        self.limits.concurrency_per_tenant = Some(checked_concurrency(deliveries)?);
        Ok(self)
    }

    /// Sets how many deliveries all processes together have under way. Defaults to no limit.
    ///
    /// Each worker that is alive has its share, all about the same. It is a coarse limit, kept through heartbeats: a worker
    /// that starts beside others gets its share after two of them (10 s), and that of one that was killed is free after
    /// four (20 s). An attempt that takes longer than that keeps its place meanwhile. Give all workers the same limit.
    ///
    /// # Errors
    ///
    /// [`InvalidLimit`] if it is 0 or more than 10,000.
    pub fn fleet_concurrency(mut self, deliveries: usize) -> Result<Self, InvalidLimit> {
        self.limits.fleet_concurrency = Some(checked_concurrency(deliveries)?);
        Ok(self)
    }

    /// Sets how many deliveries a second all processes together begin. Defaults to no limit.
    ///
    /// Workers reserve for half a second ahead, through the database: over ten seconds there are at most a tenth more, and
    /// nearly as many if there is enough to do. Give all workers the same limit.
    ///
    /// # Errors
    ///
    /// [`InvalidLimit`] if it is not a number above 0.
    pub fn fleet_rate(mut self, per_second: f64) -> Result<Self, InvalidLimit> {
        self.limits.fleet_rate = Some(checked_rate(per_second)?);
        Ok(self)
    }

    /// Sets how many deliveries a second each process begins at most. Defaults to no limit.
    ///
    /// # Errors
    ///
    /// [`InvalidLimit`] if it is not a number above 0.
    pub fn rate(mut self, per_second: f64) -> Result<Self, InvalidLimit> {
        self.limits.rate = Some(checked_rate(per_second)?);
        Ok(self)
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which events it takes.
    #[must_use]
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Which events wait for each other.
    #[must_use]
    pub fn key_choice(&self) -> &Ordering {
        &self.ordering
    }

    /// The retry policy, if one was set.
    #[must_use]
    pub fn retry_policy(&self) -> Option<RetryPolicy> {
        self.retry
    }

    /// Where it begins.
    #[must_use]
    pub fn start_position(&self) -> StartPosition {
        self.start
    }

    /// What the rest of a key does after a dead letter.
    #[must_use]
    pub fn dead_letter_policy(&self) -> AfterDeadLetter {
        self.after_dead_letter
    }

    /// How much of it is delivered at once.
    #[must_use]
    pub fn limits(&self) -> DeliveryLimits {
        self.limits
    }
}

fn checked_concurrency(deliveries: usize) -> Result<usize, InvalidLimit> {
    if !(1..=10_000).contains(&deliveries) {
        return Err(InvalidLimit("the concurrency must be between 1 and 10,000"));
    }
    Ok(deliveries)
}

fn checked_rate(per_second: f64) -> Result<f64, InvalidLimit> {
    if !per_second.is_finite() || per_second <= 0.0 {
        return Err(InvalidLimit("the rate must be a number of deliveries per second above 0"));
    }
    Ok(per_second)
}

/// Where a new subscription begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartPosition {
    /// With the next event that commits.
    #[default]
    Now,
    /// With the oldest event that is still retained.
    Beginning,
    /// With the first event stored at or after this time of the database's clock.
    Since(DateTime<Utc>),
}

/// Which events of a subscription wait for each other: those with the same key are delivered one after another in
/// commit order, those with different keys side by side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ordering {
    /// Events of one aggregate wait for each other.
    #[default]
    Aggregate,
    /// No event waits for another.
    None,
    /// Events of one tenant wait for each other; so do all events without a tenant.
    Tenant,
    /// Events with the same value of this tag wait for each other; so do all events without the tag.
    Tag(String),
    /// Every event waits for all before it. Commits queue up behind each other too: the cost of a total order.
    Global,
}

impl Ordering {
    /// The key of an event.
    #[must_use]
    pub fn key(&self, subject: &Subject<'_>) -> String {
        match self {
            // The first slash ends the type, so that `a/b` with the id `c` is not `a` with the id `b/c`.
            Self::Aggregate if subject.aggregate_type.contains('/') => {
                format!("{}/{}", subject.aggregate_type.replace('/', "%2F"), subject.aggregate_id)
            }
            Self::Aggregate => format!("{}/{}", subject.aggregate_type, subject.aggregate_id),
            Self::None => subject.id.to_string(),
            Self::Tenant => subject.tenant.unwrap_or_default().to_owned(),
            Self::Tag(tag) => subject.tags.get(tag).cloned().unwrap_or_default(),
            Self::Global => String::new(),
        }
    }
}

/// Which events a subscription takes; all conditions must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Filter {
    types: Vec<TypePattern>,
    required_tags: Vec<String>,
    any_of_tags: Vec<String>,
    tenant: Option<String>,
}

impl Filter {
    /// Whether the event is taken.
    #[must_use]
    pub fn matches(&self, subject: &Subject<'_>) -> bool {
        let has = |tag: &String| subject.tags.contains_key(tag);
        (self.types.is_empty() || self.types.iter().any(|pattern| pattern.matches(subject.event_type)))
            && self.required_tags.iter().all(has)
            && (self.any_of_tags.is_empty() || self.any_of_tags.iter().any(has))
            && (self.tenant.is_none() || self.tenant.as_deref() == subject.tenant)
    }

    /// The patterns of event types; empty means all.
    #[must_use]
    pub fn types(&self) -> &[TypePattern] {
        &self.types
    }
}

/// What filters and orderings look at.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The event's id.
    pub id: Uuid,
    /// The event type.
    pub event_type: &'a str,
    /// The type of the aggregate.
    pub aggregate_type: &'a str,
    /// The id of the aggregate.
    pub aggregate_id: &'a str,
    /// The tenant.
    pub tenant: Option<&'a str>,
    /// The tags.
    pub tags: &'a BTreeMap<String, String>,
}

impl<'a> Subject<'a> {
    /// Looks at an event that is about to be flushed with this tenant.
    #[must_use]
    pub fn of_new(event: &'a NewEvent, tenant: Option<&'a str>) -> Self {
        Self {
            id: event.id,
            event_type: &event.event_type,
            aggregate_type: &event.aggregate_type,
            aggregate_id: &event.aggregate_id,
            tenant,
            tags: &event.tags,
        }
    }

    /// Looks at an event that is stored.
    #[must_use]
    pub fn of_recorded(event: &'a RecordedEvent) -> Self {
        Self {
            id: event.id,
            event_type: &event.event_type,
            aggregate_type: &event.aggregate_type,
            aggregate_id: &event.aggregate_id,
            tenant: event.tenant.as_deref(),
            tags: &event.tags,
        }
    }
}

/// A pattern of event types: `todo.created`, `todo.*` or `*`. The prefix ends with one of `.`, `_`, `:`, `/`, `-`, so that
/// `todo*` does not take `todolist.created` by accident.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TypePattern {
    text: String,
}

/// A pattern that is neither a name nor a prefix.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a pattern of event types; use a type (todo.created), a prefix that ends with '.', '_', ':', '/' or '-' \
     (todo.*, EMBED_*), or all (*)"
)]
pub struct InvalidPattern(String);

impl TypePattern {
    /// Whether the event type fits.
    #[must_use]
    pub fn matches(&self, event_type: &str) -> bool {
        match self.text.strip_suffix('*') {
            Some(prefix) => event_type.starts_with(prefix),
            None => event_type == self.text,
        }
    }
}

impl FromStr for TypePattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = match text.strip_suffix('*') {
            None => Some(text),
            Some(prefix) => prefix.strip_suffix(['.', '_', ':', '/', '-']),
        };
        let valid = text == "*" || name.is_some_and(|name| check_name("pattern", name).is_ok());
        if valid { Ok(Self { text: text.to_owned() }) } else { Err(InvalidPattern(text.chars().take(80).collect())) }
    }
}

impl TryFrom<String> for TypePattern {
    type Error = InvalidPattern;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<TypePattern> for String {
    fn from(pattern: TypePattern) -> Self {
        pattern.text
    }
}

impl fmt::Display for TypePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn event(event_type: &str, tags: &[&str]) -> NewEvent {
        let event = NewEvent::dynamic(event_type, "wallet", "7", &json!({})).unwrap();
        tags.iter().fold(event, |event, tag| event.tag(*tag, "v").unwrap())
    }

    fn takes(subscription: &Subscription, event: &NewEvent, tenant: Option<&str>) -> bool {
        subscription.filter().matches(&Subject::of_new(event, tenant))
    }

    #[test]
    fn patterns_work_on_names_as_people_have_them() {
        for (pattern, taken, other) in [
            ("OrderCreated", "OrderCreated", "ordercreated"),
            ("EMBED_*", "EMBED_UPSERT", "EMBEDDED"),
            ("SYSTEM.*", "SYSTEM.IMPORT", "system.import"),
            ("shop:order/*", "shop:order/placed", "shop:orders"),
            ("a-*", "a-b", "a.b"),
        ] {
            let subscription = Subscription::new("s").unwrap().events([pattern]).unwrap();
            assert!(takes(&subscription, &event(taken, &[]), None), "{pattern} {taken}");
            assert!(!takes(&subscription, &event(other, &[]), None), "{pattern} {other}");
        }
    }

    #[test]
    fn two_aggregates_never_have_one_key() {
        let key = |kind: &str, id: &str| {
            let event = NewEvent::dynamic("x", kind, id, &json!({})).unwrap();
            Ordering::Aggregate.key(&Subject::of_new(&event, None))
        };
        assert_ne!(key("a/b", "c"), key("a", "b/c"));
        assert_ne!(key("a/b", "c"), key("a", "%2Fb/c"));
        assert_eq!(key("wallet", "7/8"), "wallet/7/8");
    }

    #[test]
    fn patterns_are_exact_or_a_prefix_or_all() {
        let subscription = Subscription::new("s").unwrap().events(["project.*", "user.deleted"]).unwrap();
        for (event_type, taken) in [
            ("project.created", true),
            ("project.a.b", true),
            ("projects.created", false),
            ("project", false),
            ("user.deleted", true),
            ("user.deleted.twice", false),
        ] {
            assert_eq!(takes(&subscription, &event(event_type, &[]), None), taken, "{event_type}");
        }
        assert!(takes(&Subscription::new("s").unwrap().events(["*"]).unwrap(), &event("any", &[]), None));
        for bad in ["", "to do", "*.created", "todo*", ".*.*"] {
            assert!(Subscription::new("s").unwrap().events([bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn tags_are_all_required_or_any_of_them() {
        let all = Subscription::new("s").unwrap().required_tags(["a", "b"]);
        let any = Subscription::new("s").unwrap().any_of_tags(["a", "b"]);
        for (tags, by_all, by_any) in [(&["a", "b"][..], true, true), (&["b"], false, true), (&["c"], false, false)] {
            assert_eq!(takes(&all, &event("x", tags), None), by_all, "{tags:?}");
            assert_eq!(takes(&any, &event("x", tags), None), by_any, "{tags:?}");
        }
    }

    #[test]
    fn a_tenants_subscription_takes_only_its_events() {
        let subscription = Subscription::new("s").unwrap().tenant("acme").unwrap();
        assert!(takes(&subscription, &event("x", &[]), Some("acme")));
        assert!(!takes(&subscription, &event("x", &[]), Some("other")));
        assert!(!takes(&subscription, &event("x", &[]), None));
    }

    #[test]
    fn the_key_follows_the_ordering() {
        let event = event("x", &["region"]);
        let subject = Subject::of_new(&event, Some("acme"));
        for (ordering, key) in [
            (Ordering::Aggregate, "wallet/7".to_owned()),
            (Ordering::None, event.id().to_string()),
            (Ordering::Tenant, "acme".to_owned()),
            (Ordering::Tag("region".to_owned()), "v".to_owned()),
            (Ordering::Tag("missing".to_owned()), String::new()),
            (Ordering::Global, String::new()),
        ] {
            assert_eq!(ordering.key(&subject), key, "{ordering:?}");
        }
    }

    #[test]
    fn filters_survive_storage() {
        let subscription = Subscription::new("s").unwrap().events(["a.*"]).unwrap().required_tags(["t"]);
        let stored = serde_json::to_string(subscription.filter()).unwrap();
        assert_eq!(&serde_json::from_str::<Filter>(&stored).unwrap(), subscription.filter());
    }

    proptest! {
        #[test]
        fn any_pattern_takes_what_it_begins_with_or_is_refused(
            text in prop_oneof![any::<String>(), "[A-Za-z0-9_.:/*-]{0,20}"],
            rest in "[A-Za-z0-9_.:/-]{1,20}",
        ) {
            if let Ok(pattern) = text.parse::<TypePattern>() {
                prop_assert_eq!(pattern.to_string(), text.as_str());
                let longer = text.strip_suffix('*').unwrap_or(&text).to_owned() + &rest;
                prop_assert_eq!(pattern.matches(&longer), text.ends_with('*'));
                prop_assert!(text.ends_with('*') || pattern.matches(&text));
            }
        }
    }
}
