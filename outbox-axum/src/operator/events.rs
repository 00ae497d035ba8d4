use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use outbox_core::RecordedEvent;
use outbox_seaorm::{DamagedEvent, EventDetails, EventFilter, Outbox, Why};
use serde::Serialize;
use serde_json::{Value, json, value::RawValue};

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
    let items: Vec<Value> = found.rows().into_iter().map(|row| row.map_or_else(damaged, shown)).collect();
    Ok(page(items, found.next))
}

pub(super) async fn show(
    State(outbox): State<Outbox>,
    EventId(id): EventId,
    fields: Fields,
) -> Result<Response, Refusal> {
    fields.only(&[])?;
    let EventDetails { event, deliveries, .. } = outbox.event(id).await?.ok_or_else(Refusal::no_event)?;
    let (mut answer, payload) = match &event {
        Ok(event) => (shown(event), &event.payload),
        Err(event) => (damaged(event), &event.event.payload),
    };
    answer["deliveries"] = json!(deliveries);
    Ok(with_payload(answer, payload))
}

pub(super) async fn why(
    State(outbox): State<Outbox>,
    EventId(id): EventId,
    fields: Fields,
) -> Result<Json<Vec<Why>>, Refusal> {
    fields.only(&[])?;
    Ok(Json(outbox.why(id).await?.ok_or_else(Refusal::no_event)?))
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

/// With `null` for what cannot be read.
fn damaged(damaged: &DamagedEvent) -> Value {
    let mut answer = shown(&damaged.event);
    for field in &damaged.missing {
        answer[*field] = Value::Null;
    }
    answer["unreadable"] = json!(damaged.error);
    answer
}

/// With the payload byte for byte, as JSON: numbers of any length stay what they are. One that is not JSON any more is
/// shown as text.
#[derive(Serialize)]
struct WithPayload<'a> {
    #[serde(flatten)]
    event: Value,
    payload: &'a RawValue,
}

fn with_payload(mut answer: Value, payload: &str) -> Response {
    match serde_json::from_str(payload) {
        Ok(payload) => Json(WithPayload { event: answer, payload }).into_response(),
        Err(_) => {
            answer["payload"] = payload.into();
            Json(answer).into_response()
        }
    }
}
