use axum::{Json, extract::State};
use outbox_seaorm::{Changed, DeadLetterFilter, Outbox};
use serde_json::Value;

use super::{
    change::Change,
    fields::{Fields, running_number},
    page,
    refusal::Refusal,
};

const FILTER: [&str; 4] = ["subscription", "event_type", "since", "until"];

pub(super) async fn list(State(outbox): State<Outbox>, fields: Fields) -> Result<Json<Value>, Refusal> {
    fields.only(&[FILTER.as_slice(), &["cursor", "limit"]].concat())?;
    let filter = filter(&outbox, &fields).await?;
    let limit = fields.limit()?;
    // One more tells whether there is another page.
    let mut found = outbox.dead_letters(&filter, fields.number("cursor")?, limit + 1).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| more).map(|dead| dead.id);
    Ok(page(found, next))
}

pub(super) async fn replay(State(outbox): State<Outbox>, change: Change) -> Result<Json<Changed>, Refusal> {
    let (filter, dry_run) = selected(&outbox, &change).await?;
    Ok(Json(outbox.replay_dead_letters(&filter, dry_run, &change.by()?).await?))
}

pub(super) async fn discard(State(outbox): State<Outbox>, change: Change) -> Result<Json<Changed>, Refusal> {
    let (filter, dry_run) = selected(&outbox, &change).await?;
    Ok(Json(outbox.discard_dead_letters(&filter, dry_run, &change.by()?).await?))
}

async fn selected(outbox: &Outbox, change: &Change) -> Result<(DeadLetterFilter, bool), Refusal> {
    let fields = &change.fields;
    fields.only(&["ids", "filter", "dry_run", "reason"])?;
    let ids = fields.ids("ids", running_number)?;
    let within = fields.object("filter", "filter.")?;
    let selected = match (ids, within) {
        (Some(ids), None) => DeadLetterFilter { ids: Some(ids), ..DeadLetterFilter::default() },
        (None, Some(within)) => {
            within.only(&FILTER)?;
            filter(outbox, &within).await?
        }
        _ => return Err(Refusal::bad("give either ids or filter; an empty filter means all dead letters")),
    };
    Ok((selected, fields.flag("dry_run")?))
}

async fn filter(outbox: &Outbox, fields: &Fields) -> Result<DeadLetterFilter, Refusal> {
    let filter = DeadLetterFilter {
        ids: None,
        subscription: fields.subscription()?,
        event_type: fields.name("event_type")?,
        since: fields.time("since")?,
        until: fields.time("until")?,
    };
    match &filter.subscription {
        Some(name) if !outbox.is_registered(name).await? => Err(Refusal::no_subscription()),
        _ => Ok(filter),
    }
}
