use clap::{Args, Subcommand};
use outbox_seaorm::Outbox;
use serde_json::json;

use crate::{
    Answer,
    output::{Output, or_dash, table, time},
    select,
};

#[derive(Subcommand, Default)]
pub(crate) enum Unrouted {
    /// Says how many events wait, and lists those that could not be routed.
    #[default]
    List,
    /// Routes all events that wait, once, without a worker. Nothing is delivered.
    Route,
    /// Has events routed again that could not be.
    PutBack(Selected),
    /// Gives up events that could not be routed: no subscription gets them; they stay, and can be replayed.
    Discard(Selected),
}

#[derive(Args)]
pub(crate) struct Selected {
    /// The ids of the list; or --all.
    ids: Vec<i64>,
    /// All that could not be routed.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    by: select::Who,
}

/// How many are listed.
const LISTED: u32 = 500;

pub(crate) async fn run(outbox: &Outbox, command: Unrouted) -> Answer {
    match command {
        Unrouted::List => list(outbox).await,
        Unrouted::Route => {
            let routed = outbox.route_waiting().await?;
            Ok(Output::new(format!("routed: {routed}\n"), json!({ "routed": routed })))
        }
        Unrouted::PutBack(selected) => {
            let changed = outbox.put_back(selected.positions()?.as_deref(), &selected.by.by()).await?;
            Ok(Output::new(format!("put back: {changed}\n"), json!({ "changed": changed })))
        }
        Unrouted::Discard(selected) => {
            let changed = outbox.discard_set_aside(selected.positions()?.as_deref(), &selected.by.by()).await?;
            Ok(Output::new(format!("discarded: {changed}\n"), json!({ "changed": changed })))
        }
    }
}

async fn list(outbox: &Outbox) -> Answer {
    let unrouted = outbox.unrouted().await?;
    let found = outbox.set_aside(None, LISTED).await?;
    let age = unrouted.oldest_age_seconds.map(|age| format!(", the oldest for {age:.1} s")).unwrap_or_default();
    let mut text = format!("not routed yet: {}{age}; set aside: {}\n", unrouted.waiting, unrouted.set_aside);
    let rows = found.iter().map(|each| {
        [
            each.position.to_string(),
            time(each.set_aside_at),
            or_dash(each.event_id),
            or_dash(each.event_type.as_ref()),
            each.error.clone(),
        ]
    });
    if !found.is_empty() {
        text += &table(["id", "set aside at", "event", "type", "error"], rows);
    }
    let items: Vec<_> = found
        .iter()
        .map(|each| {
            json!({
                "id": each.position.to_string(), "event_id": each.event_id, "event_type": each.event_type,
                "set_aside_at": each.set_aside_at, "error": each.error,
            })
        })
        .collect();
    Ok(Output::new(text, json!({ "unrouted": unrouted, "items": items })))
}

impl Selected {
    /// `None` for all.
    fn positions(&self) -> Result<Option<Vec<i64>>, Box<dyn std::error::Error>> {
        match (self.ids.is_empty(), self.all) {
            (false, false) => Ok(Some(self.ids.clone())),
            (true, true) => Ok(None),
            _ => Err("give either ids, or --all".into()),
        }
    }
}
