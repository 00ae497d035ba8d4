//! What a routing statement is to do: pure, from the events, the subscriptions and what is locked by others.

use std::collections::{HashMap, HashSet};

use outbox_core::{RecordedEvent, Subject};
use serde::Serialize;

use crate::subscriptions::KnownSubscriptions;

/// An event that waits to be routed.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub(super) position: i64,
    /// Without its payload, unless it came from a commit of this process or was read whole; `None` if its row is gone.
    pub(crate) event: Option<RecordedEvent>,
    pub(super) has_payload: bool,
    /// In seconds, by the database's clock.
    pub(super) due: f64,
}

/// A lane: subscription and key.
pub(crate) type Key = (i32, String);

#[derive(Debug, PartialEq, Serialize)]
pub(super) struct EventRow {
    pub(super) position: i64,
    pub(super) due: f64,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct LaneRow {
    pub(super) n: usize,
    pub(super) subscription: i32,
    pub(super) key: String,
    /// That of its first event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tenant: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct MatchRow {
    lane: usize,
    position: i64,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) events: Vec<EventRow>,
    pub(super) lanes: Vec<LaneRow>,
    pub(super) matches: Vec<MatchRow>,
    /// Of each lane its events, as indexes of what was given.
    pub(super) runs: Vec<Vec<usize>>,
    /// How many events have to wait for a lane that somebody has locked.
    pub(super) left_out: usize,
    /// Whether there were more events than it takes.
    pub(super) is_cut: bool,
}

impl Plan {
    pub(super) fn positions(&self) -> impl Iterator<Item = i64> + '_ {
        self.events.iter().map(|event| event.position)
    }

    /// The last position.
    pub(super) fn last(&self) -> i64 {
        self.positions().last().unwrap_or(0)
    }
}

/// Events in the order of their positions. One that belongs to a blocked lane is left out, and so is what follows it in
/// any of its lanes, of whatever subscription: a lane gets its events in order. It ends after `most` events.
pub(super) fn plan(
    events: &[Waiting],
    known: &KnownSubscriptions,
    most: usize,
    blocked: &HashSet<Key>,
    marks: &HashSet<i64>,
) -> Plan {
    let mut plan = Plan::default();
    let mut numbers: HashMap<Key, usize> = HashMap::new();
    let mut blocked_here: HashSet<Key> = HashSet::new();
    for (index, waiting) in events.iter().enumerate() {
        if plan.events.len() == most {
            plan.is_cut = true;
            break;
        }
        let keys = waiting.event.as_ref().map(|event| keys(event, known)).unwrap_or_default();
        let waits = marks.contains(&waiting.position)
            || keys.iter().any(|key| blocked.contains(key) || blocked_here.contains(key));
        if waits {
            blocked_here.extend(keys);
            plan.left_out += 1;
            continue;
        }
        plan.events.push(EventRow { position: waiting.position, due: waiting.due });
        for key in keys {
            let (subscription, name) = key.clone();
            let lane = *numbers.entry(key).or_insert_with(|| {
                let tenant = waiting.event.as_ref().and_then(|event| event.tenant.clone());
                plan.lanes.push(LaneRow { n: plan.lanes.len(), subscription, key: name, tenant });
                plan.runs.push(Vec::new());
                plan.lanes.len() - 1
            });
            plan.matches.push(MatchRow { lane, position: waiting.position });
            plan.runs[lane].push(index);
        }
    }
    plan
}

/// The lanes of an event.
pub(crate) fn keys(event: &RecordedEvent, known: &KnownSubscriptions) -> Vec<Key> {
    let subject = Subject::of_recorded(event);
    known.matching(&subject).into_iter().map(|each| (each.id, each.ordering.key(&subject))).collect()
}

#[cfg(test)]
mod tests {
    use outbox_core::{Context, NewEvent, Ordering, Subscription};

    use super::*;

    /// Events of these aggregates, at positions from 1 on, each with its tenant.
    fn waiting(events: &[(&str, &str)]) -> Vec<Waiting> {
        (1..)
            .zip(events)
            .map(|(position, (id, tenant))| {
                let mut context = Context::default();
                context.tenant = Some((*tenant).to_owned());
                let event = NewEvent::dynamic("todo.created", "todo", *id, &()).unwrap();
                let event = event.into_recorded(position, chrono::DateTime::UNIX_EPOCH, &context);
                Waiting { position, event: Some(event), has_payload: true, due: 1.0 }
            })
            .collect()
    }

    fn per_aggregate_and_tenant() -> KnownSubscriptions {
        let subscription = |name: &str, ordering| Subscription::new(name).unwrap().ordering(ordering);
        KnownSubscriptions::of([subscription("a", Ordering::Aggregate), subscription("t", Ordering::Tenant)])
    }

    fn planned(events: &[(&str, &str)], most: usize, blocked: &[(i32, &str)], marks: &[i64]) -> Plan {
        let blocked = blocked.iter().map(|(subscription, key)| (*subscription, (*key).to_owned())).collect();
        plan(&waiting(events), &per_aggregate_and_tenant(), most, &blocked, &marks.iter().copied().collect())
    }

    #[test]
    fn each_lane_gets_its_events_in_their_order() {
        let plan = planned(&[("1", "x"), ("2", "x"), ("1", "y")], 10, &[], &[]);
        assert_eq!(plan.positions().collect::<Vec<_>>(), [1, 2, 3]);
        let lanes: Vec<_> = plan.lanes.iter().map(|lane| (lane.subscription, lane.key.as_str())).collect();
        assert_eq!(lanes, [(1, "todo/1"), (2, "x"), (1, "todo/2"), (2, "y")]);
        assert_eq!(plan.runs, [vec![0, 2], vec![0, 1], vec![1], vec![2]]);
        assert_eq!(plan.matches.len(), 6);
        assert_eq!((plan.left_out, plan.is_cut, plan.last()), (0, false, 3));
    }

    /// The second follows the first in its tenant's lane, the third follows the second in its aggregate's.
    #[test]
    fn what_is_blocked_holds_up_what_follows_it_in_any_subscription() {
        let events = [("1", "x"), ("2", "x"), ("2", "y"), ("3", "z")];
        let plan = planned(&events, 10, &[(1, "todo/1")], &[]);
        assert_eq!((plan.positions().collect::<Vec<_>>(), plan.left_out), (vec![4], 3));
        let plan = planned(&events, 10, &[(2, "todo/1")], &[]);
        assert_eq!(plan.left_out, 0, "a key of another subscription");
        let plan = planned(&events, 10, &[], &[2]);
        assert_eq!(plan.positions().collect::<Vec<_>>(), [1, 4], "a mark that is locked");
    }

    #[test]
    fn it_ends_after_as_many_events_as_it_may_take() {
        let plan = planned(&[("1", "x"), ("2", "x"), ("3", "x")], 2, &[], &[]);
        assert_eq!((plan.positions().collect::<Vec<_>>(), plan.is_cut), (vec![1, 2], true));
    }
}
