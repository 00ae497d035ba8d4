use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A payload of the shape `{"data": …, "previous": …}`: the state after a change, and what it was before.
///
/// `previous` holds only the attributes whose value changed, and is absent for a creation.
///
/// ```
/// use outbox_core::Change;
/// use serde_json::json;
///
/// let change = Change::between(&json!({"title": "a", "done": false}), json!({"title": "b", "done": false}))?;
/// assert_eq!(
///     serde_json::to_value(&change)?,
///     json!({"data": {"title": "b", "done": false}, "previous": {"title": "a"}})
/// );
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change<T> {
    /// The state after the change.
    pub data: T,
    /// The old values of the attributes that changed; `None` for a creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Map<String, Value>>,
}

impl<T> Change<T> {
    /// The first state of something: nothing came before.
    pub fn created(data: T) -> Self {
        Self { data, previous: None }
    }
}

impl<T: Serialize> Change<T> {
    /// The step from `old` to `new`, with the old value of each top-level attribute that differs.
    ///
    /// # Errors
    ///
    /// If one of the two does not serialize to JSON.
    pub fn between(old: &T, new: T) -> Result<Self, serde_json::Error> {
        let before = serde_json::to_value(old)?;
        let after = serde_json::to_value(&new)?;
        let previous = match before {
            Value::Object(before) => {
                before.into_iter().filter(|(name, value)| after.get(name) != Some(value)).collect()
            }
            _ => Map::new(),
        };
        Ok(Self { data: new, previous: Some(previous) })
    }
}
