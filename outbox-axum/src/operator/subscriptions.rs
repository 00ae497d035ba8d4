use axum::{Json, extract::State};
use outbox_seaorm::{Changed, Outbox, Replay};
use serde_json::{Value, json};

use super::{change::Change, fields::SubscriptionName, refusal::Refusal};

pub(super) async fn pause(
    State(outbox): State<Outbox>,
    SubscriptionName(name): SubscriptionName,
    change: Change,
) -> Result<Json<Value>, Refusal> {
    change.fields.only(&["reason"])?;
    let changed = outbox.pause_as(&name, &change.by()?).await?.ok_or_else(Refusal::no_subscription)?;
    Ok(Json(json!({ "changed": u8::from(changed) })))
}

pub(super) async fn resume(
    State(outbox): State<Outbox>,
    SubscriptionName(name): SubscriptionName,
    change: Change,
) -> Result<Json<Value>, Refusal> {
    change.fields.only(&["reason"])?;
    let changed = outbox.resume_as(&name, &change.by()?).await?.ok_or_else(Refusal::no_subscription)?;
    Ok(Json(json!({ "changed": u8::from(changed) })))
}

pub(super) async fn replay(
    State(outbox): State<Outbox>,
    SubscriptionName(name): SubscriptionName,
    change: Change,
) -> Result<Json<Changed>, Refusal> {
    let fields = &change.fields;
    fields.only(&["since", "event_ids", "event_type", "dry_run", "reason"])?;
    let since = fields.time("since")?;
    let event_ids = fields.ids("event_ids", |id| id.parse().ok())?;
    let event_type = fields.name("event_type")?;
    let replay = match (since, event_ids, event_type) {
        (Some(since), None, None) => Replay::Since(since),
        (None, Some(ids), None) => Replay::Events(ids),
        (None, None, Some(event_type)) => Replay::EventType(event_type),
        _ => return Err(Refusal::bad("give one of since, event_ids and event_type")),
    };
    let replayed = outbox.replay(&name, &replay, fields.flag("dry_run")?, &change.by()?).await?;
    Ok(Json(replayed.ok_or_else(Refusal::no_subscription)?))
}
