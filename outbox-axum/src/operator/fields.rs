use axum::extract::{FromRequestParts, Path, Query};
use chrono::{DateTime, Datelike, Utc};
use http::request::Parts;
use outbox_core::{check_id, check_name, check_subscription_name};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::refusal::Refusal;

/// Items of a page, if nothing else is asked for, and at most.
const PAGE: u32 = 50;
const LARGEST_PAGE: u32 = 500;

/// How many ids one request may name.
const MOST_IDS: usize = 10_000;

/// The parameters of a request, or the members of its body: read one by one, each refused with a sentence that names it.
#[derive(Debug, Default)]
pub(crate) struct Fields {
    /// Where they stand in the body, with a dot: `filter.`.
    within: &'static str,
    values: Map<String, Value>,
}

impl Fields {
    pub(crate) fn new(within: &'static str, values: Map<String, Value>) -> Self {
        Self { within, values }
    }

    /// Refuses what nobody has asked for: a misspelt filter must not select everything.
    pub(crate) fn only(&self, known: &[&str]) -> Result<(), Refusal> {
        match self.values.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let name: String = name.chars().take(80).collect();
                Err(self.bad(&name, &format!("is not known here; known are {}", known.join(", "))))
            }
        }
    }

    /// A name as events have it.
    pub(crate) fn name(&self, name: &str) -> Result<Option<String>, Refusal> {
        let valid = "must have 1 to 128 of the characters A-Z, a-z, 0-9, _ . : / -";
        self.checked(name, |text| check_name("it", text).is_ok(), valid)
    }

    /// The name of a subscription.
    pub(crate) fn subscription(&self) -> Result<Option<String>, Refusal> {
        let valid = "must have 1 to 64 of the characters a-z, 0-9, _ . -";
        self.checked("subscription", |text| check_subscription_name(text).is_ok(), valid)
    }

    /// An id that comes from outside.
    pub(crate) fn id(&self, name: &str) -> Result<Option<String>, Refusal> {
        self.checked(name, |text| check_id("it", text).is_ok(), "must have 1 to 255 bytes and no NUL character")
    }

    /// A running number as text: a cursor, or the id of a dead letter.
    pub(crate) fn number(&self, name: &str) -> Result<Option<i64>, Refusal> {
        let valid = "must be a number that an answer of this API has given";
        Ok(self.checked(name, |text| running_number(text).is_some(), valid)?.and_then(|text| running_number(&text)))
    }

    /// How many items a page has.
    pub(crate) fn limit(&self) -> Result<u32, Refusal> {
        let number = |text: &str| text.parse().ok().filter(|number| (1..=LARGEST_PAGE).contains(number));
        let limit = self.checked("limit", |text| number(text).is_some(), "must be a number from 1 to 500")?;
        Ok(limit.and_then(|text| number(&text)).unwrap_or(PAGE))
    }

    pub(crate) fn time(&self, name: &str) -> Result<Option<DateTime<Utc>>, Refusal> {
        // The years that every database knows.
        let time = |text: &str| {
            let time = DateTime::parse_from_rfc3339(text).ok()?.with_timezone(&Utc);
            (1..=9999).contains(&time.year()).then_some(time)
        };
        let valid = "must be a time such as 2026-01-31T12:00:00Z";
        Ok(self.checked(name, |text| time(text).is_some(), valid)?.and_then(|text| time(&text)))
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, Refusal> {
        self.checked(name, |_| true, "")
    }

    pub(crate) fn flag(&self, name: &str) -> Result<bool, Refusal> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.bad(name, "must be true or false")),
        }
    }

    pub(crate) fn ids<T>(&self, name: &str, read: fn(&str) -> Option<T>) -> Result<Option<Vec<T>>, Refusal> {
        let refused = || self.bad(name, "must be a list of ids as text, 10,000 at most");
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(ids)) if ids.len() <= MOST_IDS => {
                let ids = ids.iter().map(|id| id.as_str().and_then(read).ok_or_else(refused));
                Ok(Some(ids.collect::<Result<_, _>>()?))
            }
            Some(_) => Err(refused()),
        }
    }

    pub(crate) fn object(&self, name: &str, within: &'static str) -> Result<Option<Self>, Refusal> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Self { within, values: values.clone() })),
            Some(_) => Err(self.bad(name, "must be an object")),
        }
    }

    fn checked(&self, name: &str, valid: impl Fn(&str) -> bool, must: &str) -> Result<Option<String>, Refusal> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if valid(text) => Ok(Some(text.clone())),
            Some(Value::String(_)) => Err(self.bad(name, must)),
            Some(_) => Err(self.bad(name, "must be text")),
        }
    }

    fn bad(&self, name: &str, must: &str) -> Refusal {
        Refusal::bad(format!("{}{name} {must}", self.within))
    }
}

/// A number as the API gives it out.
pub(crate) fn running_number(text: &str) -> Option<i64> {
    let number = text.parse().ok().filter(|number| *number > 0)?;
    (i64::to_string(&number) == text).then_some(number)
}

/// From the query.
impl<S: Send + Sync> FromRequestParts<S> for Fields {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Query(pairs) = Query::<Vec<(String, String)>>::from_request_parts(parts, state)
            .await
            .map_err(|_| Refusal::bad("the query cannot be read; write it as name=value&name=value"))?;
        let mut fields = Self::default();
        for (name, value) in pairs {
            if fields.values.contains_key(&name) {
                return Err(fields.bad(&name.chars().take(80).collect::<String>(), "is given twice"));
            }
            fields.values.insert(name, Value::String(value));
        }
        Ok(fields)
    }
}

/// The name of a subscription in the path.
#[derive(Debug)]
pub(crate) struct SubscriptionName(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for SubscriptionName {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) if check_subscription_name(&name).is_ok() => Ok(Self(name)),
            // What is no name is the name of nothing.
            _ => Err(Refusal::no_subscription()),
        }
    }
}

/// The id of an event in the path.
#[derive(Debug)]
pub(crate) struct EventId(pub(crate) Uuid);

impl<S: Send + Sync> FromRequestParts<S> for EventId {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let id = Path::<String>::from_request_parts(parts, state).await.ok().and_then(|Path(id)| id.parse().ok());
        id.map(Self).ok_or_else(|| Refusal::bad("event_id must be a UUID, the id of an event"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(name: &str, value: Value) -> Fields {
        Fields::new("", Map::from_iter([(name.to_owned(), value)]))
    }

    proptest! {
        #[test]
        fn a_cursor_is_a_number_that_was_given_out(
            text in prop_oneof![any::<String>(), "[+-]?0{0,2}[0-9]{0,22}", any::<i64>().prop_map(|n| n.to_string())],
        ) {
            match one("cursor", text.as_str().into()).number("cursor") {
                Ok(Some(number)) => prop_assert!(number > 0 && number.to_string() == text),
                Ok(None) => prop_assert!(false, "a text is something"),
                Err(_) => prop_assert!(text.parse::<i64>().map_or(true, |number| number <= 0 || number.to_string() != text)),
            }
        }

        #[test]
        fn any_time_and_any_limit_is_read_or_refused(
            text in prop_oneof![
                any::<String>(),
                "[+-]?[0-9]{1,6}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{0,12})?(Z|[+-][0-9]{2}:[0-9]{2})",
                "[0-9]{0,12}",
            ],
        ) {
            if let Ok(Some(time)) = one("since", text.as_str().into()).time("since") {
                prop_assert!((1..=9999).contains(&time.year()));
            }
            if let Ok(limit) = one("limit", text.as_str().into()).limit() {
                prop_assert!((1..=LARGEST_PAGE).contains(&limit));
            }
        }
    }
}
