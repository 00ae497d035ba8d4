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
    Ok(Json(json!({
        "subscriptions": status.subscriptions,
        "workers": workers.collect::<Vec<_>>(),
        "unrouted": status.unrouted,
    })))
}

/// The newest actions of operators.
pub(super) async fn audit(State(outbox): State<Outbox>) -> Result<Json<Value>, Refusal> {
    Ok(super::page(outbox.audit_entries(50).await?, None))
}
