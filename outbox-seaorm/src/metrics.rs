//! Counters of this process, through the `metrics` facade: they go to whatever recorder the application installs, and
//! nowhere without one. Labels are names, never ids, and bounded.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
};

use metrics::counter;
use outbox_core::Batch;

/// How many values one label has at most: code may make names up.
const MOST_VALUES: usize = 200;

/// What all further names are counted as.
const OTHER: &str = "other";

static EVENT_TYPES: Names = Names(RwLock::new(None));
static AGGREGATE_TYPES: Names = Names(RwLock::new(None));

struct Names(RwLock<Option<HashSet<Arc<str>>>>);

impl Names {
    fn label(&self, name: &str) -> Arc<str> {
        let known = |names: &Option<HashSet<Arc<str>>>| names.as_ref().and_then(|names| names.get(name).cloned());
        if let Some(label) = known(&self.0.read().unwrap_or_else(PoisonError::into_inner)) {
            return label;
        }
        let mut names = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let names = names.get_or_insert_default();
        if names.len() >= MOST_VALUES && !names.contains(name) {
            return OTHER.into();
        }
        let label: Arc<str> = name.into();
        names.insert(label.clone());
        label
    }
}

/// The label `event_type`: the first 200 event types that this process meets, then `other`.
#[must_use]
pub fn event_type(name: &str) -> Arc<str> {
    EVENT_TYPES.label(name)
}

/// The label `aggregate_type`: the first 200 that this process meets, then `other`.
#[must_use]
pub fn aggregate_type(name: &str) -> Arc<str> {
    AGGREGATE_TYPES.label(name)
}

/// The events of a commit that is under way.
pub(crate) struct Recorded(BTreeMap<(Arc<str>, Arc<str>), u64>);

impl Recorded {
    pub(crate) fn of(batch: &Batch) -> Self {
        let mut events = BTreeMap::new();
        for event in &batch.events {
            let labels = (event_type(event.event_type()), aggregate_type(event.aggregate_type()));
            *events.entry(labels).or_default() += 1;
        }
        Self(events)
    }

    /// It has happened.
    pub(crate) fn count(self) {
        for ((event_type, aggregate_type), events) in self.0 {
            counter!("outbox_events_recorded_total", "event_type" => event_type, "aggregate_type" => aggregate_type)
                .increment(events);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_200_names_all_others_are_one() {
        let names = Names(RwLock::new(None));
        for n in 0..300 {
            let name = format!("made.up.{n}");
            assert_eq!(&*names.label(&name), if n < MOST_VALUES { name.as_str() } else { OTHER });
        }
        assert_eq!(&*names.label("made.up.7"), "made.up.7");
    }
}
