use axum::{Json, extract::State};
use outbox_seaorm::{Outbox, SetAside};
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    change::Change,
    fields::{Fields, running_number},
    page,
    refusal::Refusal,
};

/// As an operator sees it: ids are strings.
#[derive(Serialize)]
struct Item {
    id: String,
    event_id: Option<String>,
    event_type: Option<String>,
    set_aside_at: chrono::DateTime<chrono::Utc>,
    error: String,
}

impl From<SetAside> for Item {
    fn from(found: SetAside) -> Self {
        Self {
            id: found.position.to_string(),
            event_id: found.event_id.map(|id| id.to_string()),
            event_type: found.event_type,
            set_aside_at: found.set_aside_at,
            error: found.error,
        }
    }
}

/// Events that were set aside, the newest first.
pub(super) async fn list(State(outbox): State<Outbox>, fields: Fields) -> Result<Json<Value>, Refusal> {
    fields.only(&["cursor", "limit"])?;
    let limit = fields.limit()?;
    // One more tells whether there is another page.
    let mut found = outbox.set_aside(fields.number("cursor")?, limit + 1).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| more).map(|each| each.position);
    Ok(page(found.into_iter().map(Item::from).collect(), next))
}

pub(super) async fn put_back(State(outbox): State<Outbox>, change: Change) -> Result<Json<Value>, Refusal> {
    let positions = selected(&change)?;
    Ok(Json(json!({ "changed": outbox.put_back(positions.as_deref(), &change.by()?).await? })))
}

pub(super) async fn discard(State(outbox): State<Outbox>, change: Change) -> Result<Json<Value>, Refusal> {
    let positions = selected(&change)?;
    Ok(Json(json!({ "changed": outbox.discard_set_aside(positions.as_deref(), &change.by()?).await? })))
}

/// `None` for all.
fn selected(change: &Change) -> Result<Option<Vec<i64>>, Refusal> {
    let fields = &change.fields;
    fields.only(&["ids", "all", "reason"])?;
    match (fields.ids("ids", running_number)?, fields.flag("all")?) {
        (Some(ids), false) => Ok(Some(ids)),
        (None, true) => Ok(None),
        _ => Err(Refusal::bad("give either ids, or all: true")),
    }
}
