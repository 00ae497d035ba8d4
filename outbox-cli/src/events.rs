use std::fmt::Write;

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use outbox_core::RecordedEvent;
use outbox_seaorm::{DamagedEvent, EventFilter, Outbox};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    Answer,
    output::{Output, or_dash, plain, table, time},
    select,
};

#[derive(Subcommand)]
pub(crate) enum Events {
    /// Lists them, the newest first.
    List(List),
    /// Shows one with its payload and its deliveries.
    Show {
        /// The id of the event.
        event: Uuid,
    },
}

#[derive(Args)]
pub(crate) struct List {
    /// Only events of this type.
    #[arg(long = "type", value_parser = select::name)]
    event_type: Option<String>,
    /// Only events of aggregates of this type.
    #[arg(long, value_parser = select::name)]
    aggregate_type: Option<String>,
    /// Only events of the aggregate with this id.
    #[arg(long)]
    aggregate_id: Option<String>,
    /// Only events of this tenant.
    #[arg(long)]
    tenant: Option<String>,
    /// Only events that this kind of actor has caused.
    #[arg(long)]
    actor_kind: Option<String>,
    /// Only events since this time, or since so long ago: 2026-01-31T12:00:00Z, 2h.
    #[arg(long, value_parser = select::time)]
    since: Option<DateTime<Utc>>,
    /// Only events before this time.
    #[arg(long, value_parser = select::time)]
    until: Option<DateTime<Utc>>,
    /// The next page: what the page before gave as `next`.
    #[arg(long)]
    cursor: Option<i64>,
    /// At most this many.
    #[arg(long, default_value_t = 50)]
    limit: u32,
}

impl Default for Events {
    fn default() -> Self {
        Self::List(List {
            event_type: None,
            aggregate_type: None,
            aggregate_id: None,
            tenant: None,
            actor_kind: None,
            since: None,
            until: None,
            cursor: None,
            limit: 50,
        })
    }
}

pub(crate) async fn run(outbox: &Outbox, command: Events) -> Answer {
    match command {
        Events::List(selected) => list(outbox, selected).await,
        Events::Show { event } => show(outbox, event).await,
    }
}

async fn list(outbox: &Outbox, selected: List) -> Answer {
    let filter = EventFilter {
        event_type: selected.event_type,
        aggregate_type: selected.aggregate_type,
        aggregate_id: selected.aggregate_id,
        tenant: selected.tenant,
        actor_kind: selected.actor_kind,
        since: selected.since,
        until: selected.until,
    };
    let page = outbox.events(&filter, selected.cursor, selected.limit).await?;
    let rows = page.rows();
    let lines = rows.iter().map(|row| row.map_or_else(damaged_line, line));
    let mut text = table(["recorded at", "type", "aggregate", "actor", "event"], lines);
    if let Some(next) = page.next {
        let _ = writeln!(text, "more: --cursor {next}");
    }
    let items: Vec<Value> = rows.into_iter().map(|row| row.map_or_else(without_unreadable, without_payload)).collect();
    Ok(Output::new(text, json!({ "items": items, "next": page.next.map(|next| next.to_string()) })))
}

async fn show(outbox: &Outbox, id: Uuid) -> Answer {
    let details = outbox.event(id).await?.ok_or_else(|| no_event(id))?;
    let (event, mut shown, mut text) = match &details.event {
        Ok(event) => (event, without_payload(event), String::new()),
        Err(damaged) => (&damaged.event, without_unreadable(damaged), format!("{}\n", plain(&damaged.error))),
    };
    shown["payload"] = serde_json::from_str(&event.payload).unwrap_or_else(|_| event.payload.as_str().into());
    let [recorded_at, event_type, aggregate, ..] = details.event.as_ref().map_or_else(damaged_line, line);
    text += &format!("{event_type} of {aggregate}, recorded at {recorded_at}\n{}\n\n", plain(&event.payload));
    shown["deliveries"] = json!(details.deliveries);
    text += &table(
        ["subscription", "state", "attempts", "due at", "finished at", "error"],
        details.deliveries.iter().map(|delivery| {
            [
                delivery.subscription.clone(),
                delivery.state.to_string(),
                delivery.attempts.to_string(),
                or_dash(delivery.due_at.map(time)),
                or_dash(delivery.finished_at.map(time)),
                or_dash(delivery.error.as_ref()),
            ]
        }),
    );
    Ok(Output::new(text, shown))
}

pub(crate) async fn why(outbox: &Outbox, id: Uuid) -> Answer {
    let whys = outbox.why(id).await?.ok_or_else(|| no_event(id))?;
    let rows = whys.iter().map(|why| [why.subscription.clone(), or_dash(why.state), why.reason.clone()]);
    Ok(Output::new(table(["subscription", "state", "why"], rows), &whys))
}

/// When, type, aggregate, actor, id.
fn line(event: &RecordedEvent) -> [String; 5] {
    [
        time(event.recorded_at),
        event.event_type.clone(),
        format!("{}/{}", event.aggregate_type, event.aggregate_id),
        or_dash(event.actor.as_ref().map(|actor| format!("{}/{}", actor.kind, actor.id))),
        event.id.to_string(),
    ]
}

/// With a dash for what cannot be read, and with what is wrong.
fn damaged_line(damaged: &DamagedEvent) -> [String; 5] {
    let DamagedEvent { event, missing, error } = damaged;
    let [recorded_at, event_type, aggregate, actor, id] = line(event);
    let read = |field, text: String| or_dash((!missing.contains(&field)).then_some(text));
    let id = format!("{}, position {}: {error}", read("id", id), event.position);
    [read("recorded_at", recorded_at), read("event_type", event_type), aggregate, actor, id]
}

fn no_event(id: Uuid) -> String {
    format!("there is no event {id}; retention may have taken it away")
}

/// As the operators' API shows it.
fn without_payload(event: &RecordedEvent) -> Value {
    let bare = RecordedEvent { payload: "null".to_owned(), ..event.clone() };
    let mut shown = serde_json::to_value(bare).unwrap_or_default();
    shown["position"] = event.position.to_string().into();
    if let Some(members) = shown.as_object_mut() {
        members.remove("payload");
    }
    shown
}

/// With `null` for what cannot be read.
fn without_unreadable(damaged: &DamagedEvent) -> Value {
    let mut shown = without_payload(&damaged.event);
    for field in &damaged.missing {
        shown[*field] = Value::Null;
    }
    shown["unreadable"] = json!(damaged.error);
    shown
}
