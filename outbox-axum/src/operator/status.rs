use axum::{Json, extract::State};
use outbox_seaorm::Outbox;
use serde_json::{Value, json};

use super::refusal::Refusal;

pub(super) async fn status(State(outbox): State<Outbox>) -> Result<Json<Value>, Refusal> {
    let status = outbox.status().await?;
    let workers = status.workers.iter().map(|worker| {
        json!({
            "id": worker.id,
            "subscriptions": worker.subscriptions,
            "last_seen_seconds": worker.last_seen_seconds,
        })
    });
    Ok(Json(json!({ "subscriptions": status.subscriptions, "workers": workers.collect::<Vec<_>>() })))
}

/// The newest actions of operators.
pub(super) async fn audit(State(outbox): State<Outbox>) -> Result<Json<Value>, Refusal> {
    let entries = outbox.audit_entries(50).await?;
    let items = entries.into_iter().map(|entry| {
        json!({
            "id": entry.id.to_string(),
            "at": entry.at,
            "actor": entry.actor,
            "action": entry.action,
            "target": entry.target,
            "details": entry.details,
        })
    });
    Ok(super::page(items.collect(), None))
}
