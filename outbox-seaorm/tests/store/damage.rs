//! Rows of events that somebody has damaged: operators look for just them, so they are listed as far as they can be read.

use std::collections::HashSet;

use outbox_core::RecordedEvent;
use outbox_seaorm::{By, DamagedEvent, DeadLetterFilter, DeliveryState, EventFilter, LaneReport, Next, Replay};
use serde_json::json;
use uuid::Uuid;

use super::{
    database::DAMAGE,
    fixture::{Store, delivered, delivered_run, todo},
};

/// One event for each damage, and two that stay whole, the first and the last.
const EVENTS: usize = DAMAGE.len() + 2;

/// Damages the events at the positions from 2 on.
async fn damage(store: &Store) {
    for ((change, _), position) in DAMAGE.iter().zip(2..) {
        store.execute(&format!("update outbox_events set {change} where position = {position}")).await;
    }
}

async fn record(store: &Store) {
    store.record((0..EVENTS).map(|n| todo(&n.to_string()))).await;
}

/// What is wrong with the event at a position.
fn wrong_with(position: i64) -> Option<&'static str> {
    let index = usize::try_from(position - 2).ok()?;
    DAMAGE.get(index).map(|(_, wrong)| *wrong)
}

/// Says what is wrong with all that cannot be read, and only with that.
fn is_told(position: i64, told: Option<&str>) {
    match wrong_with(position) {
        None => assert_eq!(told, None, "{position}"),
        Some(wrong) => assert!(told.is_some_and(|told| told.contains(wrong)), "{position}: {told:?}"),
    }
}

fn newest_first() -> Vec<i64> {
    (1..=EVENTS as i64).rev().collect()
}

#[tokio::test]
async fn deliveries_of_damaged_events_are_listed_in_each_state() {
    let store = Store::new().await;
    for state in DeliveryState::ALL {
        store.subscribe(&state.to_string()).await;
    }
    record(&store).await;
    for (id, state) in (1..).zip(DeliveryState::ALL) {
        let lanes = if state == DeliveryState::Pending { Vec::new() } else { store.claim(id).await };
        let reports: Vec<LaneReport> = match state {
            DeliveryState::Pending | DeliveryState::Leased => Vec::new(),
            DeliveryState::Delivered => lanes.iter().map(delivered_run).collect(),
            DeliveryState::Dead => lanes.iter().map(dead).collect(),
        };
        store.outbox.settle(&reports).await.unwrap();
    }
    damage(&store).await;
    for state in DeliveryState::ALL {
        let records = store.outbox.deliveries(Some(&state.to_string()), None, 0, 100).await.unwrap();
        assert_eq!(records.iter().map(|record| record.event.position).collect::<Vec<_>>(), newest_first(), "{state}");
        for record in &records {
            let position = record.event.position;
            is_told(position, record.unreadable.as_deref());
            assert_eq!((record.state, &*record.event.aggregate_id), (state, &*(position - 1).to_string()));
            // The id may be what cannot be read.
            if record.event.id.is_nil() {
                continue;
            }
            let one = store.outbox.delivery(&state.to_string(), record.event.id).await.unwrap().unwrap();
            assert_eq!(
                (one.state, one.event, one.unreadable),
                (state, record.event.clone(), record.unreadable.clone())
            );
        }
    }
    assert_eq!(store.outbox.deliveries(None, None, 0, 100).await.unwrap().len(), 4 * EVENTS);
    let pages = [0, 3].map(async |offset| store.outbox.deliveries(Some("dead"), None, offset, 3).await.unwrap().len());
    for page in pages {
        assert_eq!(page.await, 3);
    }
}

#[tokio::test]
async fn damaged_events_are_listed_with_what_can_be_read_of_them() {
    let store = Store::new().await;
    record(&store).await;
    damage(&store).await;
    let page = store.outbox.events(&EventFilter::default(), None, 100).await.unwrap();
    assert_eq!((page.events.len(), page.damaged.len(), page.next), (2, DAMAGE.len(), None));
    let position = |row: Result<&RecordedEvent, &DamagedEvent>| match row {
        Ok(event) => event.position,
        Err(damaged) => damaged.event.position,
    };
    assert_eq!(page.rows().into_iter().map(position).collect::<Vec<_>>(), newest_first());
    for DamagedEvent { event, missing, error } in &page.damaged {
        is_told(event.position, Some(error));
        assert_eq!((&*event.event_type, &*event.aggregate_id), ("todo.created", &*(event.position - 1).to_string()));
        assert_eq!(event.id.is_nil(), missing.contains(&"id"), "{missing:?}");
        assert_eq!(event.recorded_at.timestamp() == 0, missing.contains(&"recorded_at"), "{missing:?}");
        if event.id.is_nil() {
            continue;
        }
        let one = store.outbox.event(event.id).await.unwrap().unwrap();
        assert_eq!((one.position, &one.event.unwrap_err().event), (event.position, event));
        assert!(store.outbox.why(event.id).await.unwrap().is_some());
    }
    let last = store.outbox.event(page.events[0].id).await.unwrap().unwrap();
    assert_eq!(last.event.unwrap(), page.events[0]);

    // However small the pages are.
    let (mut seen, mut before) = (Vec::new(), None);
    loop {
        let page = store.outbox.events(&EventFilter::default(), before, 1).await.unwrap();
        seen.extend(page.rows().into_iter().map(position));
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    assert_eq!(seen, newest_first());
}

#[tokio::test]
async fn the_status_counts_damaged_events_as_others() {
    let store = Store::new().await;
    for (change, _) in DAMAGE {
        let name = format!("s{}", fastrand::u32(..));
        store.subscribe(&name).await;
        store.record_todos(&["a"]).await;
        store.execute(&format!("update outbox_events set {change}")).await;
        let status = store.outbox.status().await.unwrap();
        let found = status.subscriptions.iter().find(|each| each.name == name).unwrap();
        assert_eq!(found.pending, 1, "{change}");
        let age = found.oldest_pending_age_seconds;
        assert!(age.is_none_or(|age| (0.0..60.0).contains(&age)), "{change}: {age:?}");
        store.execute("delete from outbox_events").await;
        assert!(store.outbox.remove(&name).await.unwrap());
    }
}

/// Each is tried again, and dies again: it is nobody's concern but its own.
#[tokio::test]
async fn dead_letters_of_damaged_events_are_listed_and_replayed_with_the_others() {
    let store = Store::new().await;
    let id = store.subscribe("s").await;
    record(&store).await;
    let reports: Vec<LaneReport> = store.claim(id).await.iter().map(dead).collect();
    store.outbox.settle(&reports).await.unwrap();
    damage(&store).await;
    let by = By::new("anna");
    let all = DeadLetterFilter::default();
    let letters = store.outbox.dead_letters(&all, None, 100).await.unwrap();
    assert_eq!(letters.iter().map(|dead| dead.position).collect::<HashSet<_>>(), newest_first().into_iter().collect());
    let replayed = store.outbox.replay_dead_letters(&all, false, &by).await.unwrap();
    assert_eq!((replayed.matched, replayed.changed), (EVENTS as u64, EVENTS as u64));
    let pending = store.outbox.deliveries(Some("s"), Some(DeliveryState::Pending), 0, 100).await.unwrap();
    assert!(pending.iter().all(|record| record.due_at.is_some_and(|at| at <= chrono::Utc::now())), "{pending:?}");
    assert_eq!(pending.len(), EVENTS);
    let lanes = store.claim(id).await;
    assert_eq!(lanes.len(), EVENTS);
    // Of those that a handler may get as well, none is missing.
    for lane in &lanes {
        let position = lane.run.first().map(|event| event.position);
        assert!(position.is_some() != lane.unreadable.is_some(), "{lane:?}");
    }
    let everything = Replay::Since(chrono::DateTime::<chrono::Utc>::MIN_UTC);
    assert!(store.outbox.replay("s", &everything, true, &by).await.unwrap().is_some());
    let ids = vec![Uuid::nil(), Uuid::now_v7()];
    assert_eq!(json!(store.outbox.replay("s", &Replay::Events(ids), true, &by).await.unwrap().unwrap().matched), 0);
}

fn dead(lane: &outbox_seaorm::ClaimedLane) -> LaneReport {
    let mut dead = delivered(lane, 1, Next::Yield);
    dead.finished[0].error = Some("no such address".to_owned());
    dead
}
