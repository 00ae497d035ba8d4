use axum::{Json, extract::State};
use outbox_core::RecordedEvent;
use outbox_seaorm::{DeliveryDetails, DeliveryState, EventDetails, EventFilter, Outbox, Why};
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    fields::{EventId, Fields},
    page,
    refusal::Refusal,
};

const FILTER: [&str; 9] =
    ["event_type", "aggregate_type", "aggregate_id", "tenant", "actor_kind", "since", "until", "cursor", "limit"];

pub(super) async fn list(State(outbox): State<Outbox>, fields: Fields) -> Result<Json<Value>, Refusal> {
    fields.only(&FILTER)?;
    let filter = EventFilter {
        event_type: fields.name("event_type")?,
        aggregate_type: fields.name("aggregate_type")?,
        aggregate_id: fields.id("aggregate_id")?,
        tenant: fields.id("tenant")?,
        actor_kind: fields.id("actor_kind")?,
        since: fields.time("since")?,
        until: fields.time("until")?,
    };
    let found = outbox.events(&filter, fields.number("cursor")?, fields.limit()?).await?;
    Ok(page(found.events.iter().map(shown).collect(), found.next))
}

pub(super) async fn show(
    State(outbox): State<Outbox>,
    EventId(id): EventId,
    fields: Fields,
) -> Result<axum::response::Response, Refusal> {
    fields.only(&[])?;
    let EventDetails { event, position, deliveries } = outbox.event(id).await?.ok_or_else(Refusal::no_event)?;
    let mut answer = match &event {
        Ok(event) => shown(event),
        Err(error) => json!({ "id": id, "position": position.to_string(), "unreadable": error }),
    };
    answer["deliveries"] = deliveries.into_iter().map(delivery).collect();
    Ok(with_payload(answer, event.ok().as_ref()))
}

pub(super) async fn why(
    State(outbox): State<Outbox>,
    EventId(id): EventId,
    fields: Fields,
) -> Result<Json<Vec<Value>>, Refusal> {
    fields.only(&[])?;
    let whys = outbox.why(id).await?.ok_or_else(Refusal::no_event)?;
    Ok(Json(whys.into_iter().map(because).collect()))
}

/// All but the payload.
fn shown(event: &RecordedEvent) -> Value {
    json!({
        "id": event.id,
        "position": event.position.to_string(),
        "event_type": event.event_type,
        "schema_version": event.schema_version,
        "aggregate_type": event.aggregate_type,
        "aggregate_id": event.aggregate_id,
        "tenant": event.tenant,
        "actor": event.actor,
        "correlation_id": event.correlation_id,
        "causation_id": event.causation_id,
        "traceparent": event.traceparent,
        "tags": event.tags,
        "occurred_at": event.occurred_at,
        "recorded_at": event.recorded_at,
    })
}

/// The payload byte for byte, as JSON: numbers of any length stay what they are. One that is not JSON any more is shown as
/// text.
fn with_payload(answer: Value, event: Option<&RecordedEvent>) -> axum::response::Response {
    use axum::response::IntoResponse;
    let mut answer = answer;
    let payload = event.map(|event| event.payload.as_str()).unwrap_or("null");
    let Ok(payload) = serde_json::from_str::<&RawValue>(payload) else {
        answer["payload"] = payload.into();
        return Json(answer).into_response();
    };
    #[derive(serde::Serialize)]
    struct Answer<'a> {
        #[serde(flatten)]
        rest: Map<String, Value>,
        payload: &'a RawValue,
    }
    let rest = answer.as_object().cloned().unwrap_or_default();
    Json(Answer { rest, payload }).into_response()
}

fn delivery(delivery: DeliveryDetails) -> Value {
    let log = delivery.attempt_log.and_then(|log| serde_json::from_str::<Value>(&log).ok());
    json!({
        "subscription": delivery.subscription,
        "state": state(delivery.state),
        "attempts": delivery.attempts,
        "due_at": delivery.due_at,
        "finished_at": delivery.finished_at,
        "leased_by": delivery.leased_by,
        "error": delivery.error,
        "attempt_log": log.unwrap_or_else(|| json!([])),
    })
}

fn because(why: Why) -> Value {
    json!({
        "subscription": why.subscription,
        "state": why.state.map_or("none", state),
        "reason": why.reason,
        "since": why.since,
        "details": why.details,
    })
}

fn state(state: DeliveryState) -> &'static str {
    match state {
        DeliveryState::Pending => "pending",
        DeliveryState::Leased => "leased",
        DeliveryState::Delivered => "delivered",
        DeliveryState::Dead => "dead",
    }
}
