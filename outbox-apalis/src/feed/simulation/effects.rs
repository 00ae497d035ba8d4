//! What events do to those who handle them, and what must be true of that.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, Utc};
use fastrand::Rng;
use futures_util::future::BoxFuture;
use outbox_core::{RecordedEvent, testing::FinishedDelivery};
use uuid::Uuid;

use super::plan::{MS, Plan};
use crate::{
    destination::{Destination, End},
    task::Attempt,
};

/// What an attempt of an event comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// It succeeds, after so many failures.
    Succeeds(u32),
    /// It always fails.
    Fails,
    /// It is refused for good.
    Refused,
    /// It kills its worker.
    Kills,
    /// It takes longer than it may, so many times.
    Hangs(u32),
    /// It minds neither time nor cancellation, so many times.
    Blocks(u32),
    /// Only the first worker knows its type.
    Unknown,
}

/// Where deliveries go to.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) outside: bool,
}

impl Destination for Place {
    fn knows(&self, _: &RecordedEvent) -> bool {
        true
    }

    fn settles(&self, event: &RecordedEvent) -> bool {
        event.event_type == "transactional"
    }

    fn is_outside(&self) -> bool {
        self.outside
    }

    fn deliver<'a>(&'a self, _: &'a Arc<RecordedEvent>, _: &'a Attempt) -> BoxFuture<'a, End> {
        unreachable!("attempts are simulated")
    }
}

/// What was committed, and what has become of it.
#[derive(Debug, Default)]
pub(super) struct Effects {
    behaviours: HashMap<i64, Behaviour>,
    events: HashMap<i64, Arc<RecordedEvent>>,
    /// The subscription that each goes to.
    of: HashMap<i64, usize>,
    /// What was committed for each key, in order.
    pushed: BTreeMap<String, Vec<i64>>,
    /// What has had its effect, or is known not to get one.
    over: HashSet<i64>,
    /// How often it had its effect.
    effects: HashMap<i64, u32>,
    /// What was removed with its subscription.
    void: HashSet<i64>,
    tries: HashMap<i64, u32>,
}

impl Effects {
    /// An event that is new.
    pub(super) fn push(
        &mut self,
        rng: &mut Rng,
        plan: &Plan,
        subscription: usize,
        good: bool,
        now: DateTime<Utc>,
    ) -> (String, Arc<RecordedEvent>) {
        let position = self.events.len() as i64 + 1;
        let key = match good {
            true => format!("{subscription} good {position}"),
            false => format!("{subscription} k{}", rng.u32(..plan.keys)),
        };
        let tenant = (plan.tenants > 0).then(|| key.len() as i64 + position).map(|n| n % i64::from(plan.tenants + 1));
        let behaviour = match rng.u8(..24) {
            _ if good => Behaviour::Succeeds(0),
            0 | 1 => Behaviour::Succeeds(rng.u32(1..4)),
            2 => Behaviour::Fails,
            3 => Behaviour::Refused,
            4 if plan.poison => Behaviour::Kills,
            5 => Behaviour::Hangs(rng.u32(1..3)),
            6 => Behaviour::Blocks(1),
            7 if plan.workers > 1 => Behaviour::Unknown,
            _ => Behaviour::Succeeds(0),
        };
        let transactional = !plan.outside && rng.u8(..3) == 0;
        let event = Arc::new(RecordedEvent {
            position,
            id: Uuid::from_u128(position as u128),
            event_type: if transactional { "transactional" } else { "plain" }.to_owned(),
            schema_version: 1,
            aggregate_type: "k".to_owned(),
            aggregate_id: key.clone(),
            payload: "{}".to_owned(),
            occurred_at: now,
            recorded_at: now,
            // Some have none.
            tenant: tenant.filter(|n| *n > 0).map(|n| format!("t{n}")),
            actor: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            tags: BTreeMap::new(),
            // What never succeeds comes to its end soon.
            max_attempts: matches!(behaviour, Behaviour::Fails | Behaviour::Kills).then_some(3),
        });
        self.behaviours.insert(position, behaviour);
        self.of.insert(position, subscription);
        self.events.insert(position, event.clone());
        self.pushed.entry(key.clone()).or_default().push(position);
        (key, event)
    }

    /// What this attempt comes to, and how long it takes if nothing stops it.
    pub(super) fn attempt(
        &mut self,
        rng: &mut Rng,
        position: i64,
        time: Duration,
        lease: Duration,
    ) -> (Behaviour, Duration) {
        let tries = self.tries.entry(position).or_default();
        *tries += 1;
        let quick = MS * rng.u32(..20);
        match self.behaviours[&position] {
            Behaviour::Succeeds(failures) if *tries <= failures => (Behaviour::Fails, quick),
            Behaviour::Hangs(times) if *tries <= times => (Behaviour::Hangs(times), 2 * time),
            Behaviour::Blocks(times) if *tries <= times => (Behaviour::Blocks(times), 2 * (time + lease)),
            Behaviour::Hangs(_) | Behaviour::Blocks(_) => (Behaviour::Succeeds(0), quick),
            other => (other, quick),
        }
    }

    /// An event has its effect. `held_at` is the dead letter that holds its key up.
    pub(super) fn happens(&mut self, event: &RecordedEvent, held_at: Option<i64>) {
        let is_held = held_at.is_some_and(|position| position < event.position);
        assert!(!is_held, "{} has its effect, and its key is held", event.position);
        let before = self.pushed[&event.aggregate_id].iter().take_while(|position| **position < event.position);
        for earlier in before {
            assert!(
                self.over.contains(earlier),
                "{} of {} has its effect before {earlier}",
                event.position,
                event.aggregate_id
            );
        }
        self.over.insert(event.position);
        let effects = self.effects.entry(event.position).or_default();
        *effects += 1;
        let once = event.event_type == "transactional";
        assert!(!once || *effects == 1, "{} has its effect twice", event.position);
    }

    /// An event is given up.
    pub(super) fn dies(&mut self, position: i64) {
        self.over.insert(position);
    }

    /// A subscription is removed: nothing of it has to happen any more.
    pub(super) fn remove_all(&mut self, subscription: usize) {
        let removed: Vec<i64> = self.of.iter().filter(|(_, of)| **of == subscription).map(|(at, _)| *at).collect();
        self.over.extend(&removed);
        self.void.extend(removed);
    }

    /// All is quiet: what was committed is finished as it had to be. If the days were `calm`, with no attempt too many.
    pub(super) fn check(&self, finished: &BTreeMap<i64, FinishedDelivery>, plan: &Plan, calm: bool) {
        for (position, behaviour) in &self.behaviours {
            if self.void.contains(position) {
                continue;
            }
            let Some(FinishedDelivery { error, attempts, log, .. }) = finished.get(position) else {
                panic!("{position} ({behaviour:?}) is lost");
            };
            if calm && !plan.outside {
                let tries = self.tries[position];
                let expected = match behaviour {
                    Behaviour::Succeeds(failures) | Behaviour::Hangs(failures) | Behaviour::Blocks(failures) => {
                        failures + 1
                    }
                    Behaviour::Fails => 3,
                    Behaviour::Refused => 1,
                    Behaviour::Kills | Behaviour::Unknown => tries,
                };
                assert_eq!(tries, expected, "tries of {position} ({behaviour:?})");
                // What a worker does not know was not tried.
                let expected = if *behaviour == Behaviour::Unknown { 1 } else { tries };
                assert_eq!(*attempts, expected, "attempts of {position} ({behaviour:?})");
                // One that blocks has its effect when it comes to its end, whenever that is.
                let once =
                    matches!(behaviour, Behaviour::Blocks(_)) || self.effects.get(position).is_none_or(|n| *n == 1);
                assert!(once, "{position} is repeated");
            }
            let counted = log.last().map_or(0, |last| last.counted);
            if *behaviour == Behaviour::Fails {
                // One that was lost with its worker may come on top.
                assert!((3..=4).contains(&counted), "{position}: {counted} attempts counted");
            }
            match behaviour {
                Behaviour::Fails | Behaviour::Kills | Behaviour::Refused => {
                    assert!(error.is_some(), "{position} ({behaviour:?}) is delivered");
                    assert!(!self.effects.contains_key(position));
                }
                _ => {
                    assert!(error.is_none(), "{position} ({behaviour:?}) is a dead letter: {error:?}");
                    assert!(self.effects.contains_key(position), "{position} is delivered without its effect");
                }
            }
        }
    }
}
