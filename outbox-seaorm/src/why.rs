use chrono::{DateTime, SecondsFormat, Utc};
use outbox_core::{Filter, RecordedEvent, Subject};
use sea_orm::{DbErr, QueryResult, Value};
use serde::{Serialize, Serializer};
use serde_json::json;
use uuid::Uuid;

use crate::{
    DeliveryDetails, DeliveryState, Outbox,
    claim::OF_RELAY,
    deliveries::{attempt_log, recorded},
    subscriptions::parsed,
    unrouted::UnroutedMark,
};

/// Why an event was or was not delivered to one subscription: what the tables say at this moment.
/// Serializes as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct Why {
    /// The name of the subscription.
    pub subscription: String,
    /// Where the delivery stands; `None`, serialized as `none`, if there is none.
    #[serde(serialize_with = "state_or_none")]
    pub state: Option<DeliveryState>,
    /// One sentence for people.
    pub reason: String,
    /// Since when it is so, as far as that is known.
    pub since: Option<DateTime<Utc>>,
    /// The same for programs: an object whose `cause` is one of `due`, `waiting`, `retry`, `blocked`, `leased`, `held`,
    /// `paused`, `circuit`, `backfill`, `unrouted`, `set-aside`, `dead`, `delivered`, `filter`, `began-later`, `unreadable`,
    /// with what belongs to it.
    pub details: serde_json::Value,
}

/// All that says where an event stands with one subscription.
#[derive(Debug)]
pub(crate) struct Standing {
    subscription: String,
    filter: Filter,
    began: DateTime<Utc>,
    now: DateTime<Utc>,
    paused_at: Option<DateTime<Utc>>,
    circuit_until: Option<DateTime<Utc>>,
    backfill: bool,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Nowhere,
    Queued(Queued),
    Delivered { attempts: u32, at: DateTime<Utc>, log: Vec<serde_json::Value> },
    Dead { id: i64, attempts: u32, at: DateTime<Utc>, error: String, log: Vec<serde_json::Value> },
}

#[derive(Debug)]
struct Queued {
    is_head: bool,
    due_at: DateTime<Utc>,
    attempts: u32,
    leased_by: Option<String>,
    lane_due_at: Option<DateTime<Utc>>,
    last_error: Option<String>,
    log: Vec<serde_json::Value>,
    head_event: Option<Uuid>,
    held: bool,
    held_by: Option<i64>,
    held_event: Option<Uuid>,
}

impl Outbox {
    /// Why an event was or was not delivered, for each subscription by name; `None` if the event is not there.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn why(&self, event: Uuid) -> Result<Option<Vec<Why>>, DbErr> {
        let Some(row) = self.query_one(self.store_reader(), self.sql().event_by_id, [event.into()]).await? else {
            return Ok(None);
        };
        let position = row.try_get("", "position")?;
        // First: what is routed meanwhile is among the deliveries.
        let mark = self.unrouted_mark(position).await?;
        let standings = self.standings(position, None).await?;
        let event = recorded(&row).ok();
        Ok(Some(standings.into_iter().map(|standing| standing.why(event.as_ref(), mark.as_ref())).collect()))
    }

    /// One statement, so that no delivery is missed that moves meanwhile.
    pub(crate) async fn standings(&self, position: i64, subscription: Option<i32>) -> Result<Vec<Standing>, DbErr> {
        let values = [position.into(), Value::Int(subscription)];
        let rows = self.query_all(self.store_reader(), self.sql().standing, values).await?;
        rows.iter().map(|row| Standing::read(row, position)).collect()
    }
}

impl Standing {
    fn read(row: &QueryResult, position: i64) -> Result<Self, DbErr> {
        Ok(Self {
            subscription: row.try_get("", "name")?,
            filter: parsed(row, "filter")?,
            began: row.try_get("", "created_at")?,
            now: row.try_get("", "now")?,
            paused_at: row.try_get("", "paused_at")?,
            circuit_until: row.try_get("", "circuit_until")?,
            backfill: row.try_get::<Option<i64>>("", "backfill_from")?.is_some(),
            place: Place::read(row, position)?,
        })
    }

    /// `waiting` is the event if it is not routed yet.
    pub(crate) fn delivery(self, waiting: Option<&RecordedEvent>) -> Option<DeliveryDetails> {
        let is_taken = waiting.is_some_and(|event| self.filter.matches(&Subject::of_recorded(event)));
        let state = self.state().or(is_taken.then_some(DeliveryState::Pending))?;
        let none = DeliveryDetails {
            subscription: self.subscription,
            state,
            attempts: 0,
            due_at: None,
            finished_at: None,
            leased_by: None,
            error: None,
            attempt_log: Vec::new(),
        };
        Some(match self.place {
            Place::Nowhere => none,
            // Attempts, lease and error are those of the lane's head; what waits behind it has none yet.
            Place::Queued(queued) if queued.is_head => DeliveryDetails {
                attempts: queued.attempts,
                due_at: queued.lane_due_at,
                leased_by: queued.leased_by,
                error: queued.last_error,
                attempt_log: queued.log,
                ..none
            },
            Place::Queued(queued) => DeliveryDetails { due_at: (!queued.held).then_some(queued.due_at), ..none },
            Place::Delivered { attempts, at, log } => {
                DeliveryDetails { attempts, finished_at: Some(at), attempt_log: log, ..none }
            }
            Place::Dead { attempts, at, error, log, .. } => {
                DeliveryDetails { attempts, finished_at: Some(at), error: Some(error), attempt_log: log, ..none }
            }
        })
    }

    fn state(&self) -> Option<DeliveryState> {
        Some(match &self.place {
            Place::Nowhere => return None,
            Place::Queued(queued) if queued.is_leased(self.now) => DeliveryState::Leased,
            Place::Queued(_) => DeliveryState::Pending,
            Place::Delivered { .. } => DeliveryState::Delivered,
            Place::Dead { .. } => DeliveryState::Dead,
        })
    }

    fn why(self, event: Option<&RecordedEvent>, mark: Option<&UnroutedMark>) -> Why {
        let mut state = self.state();
        let (reason, since, details) = match &self.place {
            Place::Nowhere => match self.why_unrouted(event, mark) {
                Some(unrouted) => {
                    state = Some(DeliveryState::Pending);
                    unrouted
                }
                None => self.why_nowhere(event),
            },
            Place::Queued(queued) => {
                let (reason, since, details) = self.why_queued(queued);
                (reason, since.or_else(|| event.map(|event| event.recorded_at)), details)
            }
            Place::Delivered { attempts, at, .. } => (
                format!("delivered at {} after {}", shown(*at), counted(*attempts)),
                Some(*at),
                json!({ "cause": "delivered", "attempts": attempts }),
            ),
            Place::Dead { id, attempts, at, error, .. } => (
                format!(
                    "dead letter since {} after {}: {error}; replay or discard dead letter {id}",
                    shown(*at),
                    counted(*attempts)
                ),
                Some(*at),
                json!({ "cause": "dead", "dead_letter": id.to_string(), "attempts": attempts, "error": error }),
            ),
        };
        Why { subscription: self.subscription, state, reason, since, details }
    }

    /// `None` if it is routed, or not for this subscription.
    fn why_unrouted(
        &self,
        event: Option<&RecordedEvent>,
        mark: Option<&UnroutedMark>,
    ) -> Option<(String, Option<DateTime<Utc>>, serde_json::Value)> {
        let mark = mark?;
        let event = event.filter(|event| self.filter.matches(&Subject::of_recorded(event)))?;
        if let Some((at, error)) = &mark.set_aside {
            let reason = format!(
                "set aside at {} because it could not be routed: {error}; put it back or discard it (outbox unrouted)",
                shown(*at)
            );
            return Some((reason, Some(*at), json!({ "cause": "set-aside", "error": error })));
        }
        let reason = if mark.has_worker {
            "not routed yet: a worker does that in a moment"
        } else {
            "not routed yet, and no worker is running; start one"
        };
        let details = json!({ "cause": "unrouted", "worker": mark.has_worker });
        Some((reason.to_owned(), Some(event.recorded_at), details))
    }

    fn why_nowhere(&self, event: Option<&RecordedEvent>) -> (String, Option<DateTime<Utc>>, serde_json::Value) {
        let Some(event) = event else {
            return ("the event's row cannot be read".to_owned(), None, json!({ "cause": "unreadable" }));
        };
        if !self.filter.matches(&Subject::of_recorded(event)) {
            let reason = "the subscription's filter does not take this event".to_owned();
            return (reason, None, json!({ "cause": "filter" }));
        }
        let reason = format!(
            "not among the deliveries of this subscription: it began at {}, or took other events when this one was \
             stored, or its history is not kept; replay the event to deliver it",
            shown(self.began)
        );
        (reason, Some(self.began), json!({ "cause": "began-later", "began_at": self.began }))
    }

    fn why_queued(&self, queued: &Queued) -> (String, Option<DateTime<Utc>>, serde_json::Value) {
        if queued.is_leased(self.now) {
            let (worker, until) = (queued.leased_by.as_deref().unwrap_or_default(), queued.lane_due_at);
            let until_text = until.map(shown).unwrap_or_default();
            let reason = match worker.strip_suffix(OF_RELAY) {
                Some(relay) => format!("{relay} has put it into Redis for a worker, until {until_text}"),
                None => format!("attempt {} is under way in {worker}, leased until {until_text}", queued.attempts),
            };
            return (reason, None, json!({ "cause": "leased", "worker": worker, "until": until }));
        }
        if queued.held {
            let (id, event) = (queued.held_by.map(|id| id.to_string()), queued.held_event.map(|id| id.to_string()));
            let which = id.as_deref().unwrap_or("that is gone");
            let reason = format!("held up by dead letter {which} of the same key, until it is replayed or discarded");
            return (reason, None, json!({ "cause": "held", "dead_letter": id, "event_id": event }));
        }
        if let Some(paused) = self.paused_at {
            let reason = format!("the subscription is paused since {}; resume it", shown(paused));
            return (reason, Some(paused), json!({ "cause": "paused" }));
        }
        if self.backfill {
            let reason = "the subscription is still being filled with events from before its registration".to_owned();
            return (reason, None, json!({ "cause": "backfill" }));
        }
        if let Some(until) = self.circuit_until {
            let until_text = shown(until);
            let reason = format!("the destination is down; the next try is at {until_text}, no attempt is spent");
            return (reason, None, json!({ "cause": "circuit", "until": until }));
        }
        if !queued.is_head {
            let event = queued.head_event.map(|id| id.to_string());
            let which = event.as_deref().unwrap_or("that cannot be read");
            let reason = format!("waits behind event {which} of the same key");
            return (reason, None, json!({ "cause": "blocked", "event_id": event }));
        }
        let due_at = queued.lane_due_at.unwrap_or(queued.due_at);
        if let Some(error) = &queued.last_error {
            let reason =
                format!("due again at {} after {}; last error: {error}", shown(due_at), counted(queued.attempts));
            let details = json!({ "cause": "retry", "due_at": due_at, "attempts": queued.attempts, "error": error });
            return (reason, None, details);
        }
        if due_at > self.now {
            return (
                format!("not due before {}", shown(due_at)),
                None,
                json!({ "cause": "waiting", "due_at": due_at }),
            );
        }
        let reason =
            format!("due since {} and not taken yet; is a worker of this subscription running?", shown(due_at));
        (reason, Some(due_at), json!({ "cause": "due", "due_at": due_at, "attempts": queued.attempts }))
    }
}

impl Place {
    fn read(row: &QueryResult, position: i64) -> Result<Self, DbErr> {
        let attempts = |column| Ok::<_, DbErr>(row.try_get::<Option<i32>>("", column)?.unwrap_or(0).unsigned_abs());
        if let Some(due_at) = row.try_get("", "due_at")? {
            return Ok(Self::Queued(Queued {
                is_head: row.try_get::<Option<i64>>("", "head")? == Some(position),
                due_at,
                attempts: attempts("lane_attempts")?,
                leased_by: row.try_get("", "leased_by")?,
                lane_due_at: row.try_get("", "lane_due_at")?,
                last_error: row.try_get("", "last_error")?,
                log: attempt_log(row, "lane_log"),
                // A row that somebody broke is as good as none.
                head_event: row.try_get("", "head_event").unwrap_or(None),
                held: row.try_get::<Option<i64>>("", "held_at")?.is_some(),
                held_by: row.try_get("", "held_by")?,
                held_event: row.try_get("", "held_event").unwrap_or(None),
            }));
        }
        if let Some(id) = row.try_get("", "dead_letter")? {
            let (attempts, log) = (attempts("dead_attempts")?, attempt_log(row, "dead_log"));
            let (at, error) = (row.try_get("", "died_at")?, row.try_get("", "error")?);
            return Ok(Self::Dead { id, attempts, at, error, log });
        }
        if let Some(at) = row.try_get("", "delivered_at")? {
            let (attempts, log) = (attempts("delivered_attempts")?, attempt_log(row, "delivered_log"));
            return Ok(Self::Delivered { attempts, at, log });
        }
        Ok(Self::Nowhere)
    }
}

impl Queued {
    fn is_leased(&self, now: DateTime<Utc>) -> bool {
        self.is_head && self.leased_by.is_some() && self.lane_due_at.is_some_and(|until| until > now)
    }
}

fn shown(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn counted(attempts: u32) -> String {
    if attempts == 1 { "1 attempt".to_owned() } else { format!("{attempts} attempts") }
}

fn state_or_none<S: Serializer>(state: &Option<DeliveryState>, serializer: S) -> Result<S::Ok, S::Error> {
    match state {
        Some(state) => state.serialize(serializer),
        None => serializer.serialize_str("none"),
    }
}
