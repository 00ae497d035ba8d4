use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use outbox_seaorm::{Outbox, entity::subscriptions};
use sea_orm::{EntityTrait, QueryOrder};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    Answer, dead,
    output::{Output, or_dash, table, time},
    select,
};

#[derive(Subcommand, Default)]
pub(crate) enum Subscriptions {
    /// Lists them with what they take and how it is ordered.
    #[default]
    List,
    /// Removes one with its unfinished deliveries, its history and its dead letters; the events stay.
    Remove {
        /// The subscription.
        subscription: String,
        /// Also if it has deliveries that are not finished, or dead letters.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        by: select::Who,
    },
}

/// Events that are delivered or that the subscription never had are delivered again, and dead ones too; what is not
/// finished is left alone.
#[derive(Args)]
#[group(skip)]
pub(crate) struct Replay {
    /// The subscription.
    #[arg(long, value_parser = select::subscription)]
    subscription: String,
    /// Events since this time, or since so long ago: 2026-01-31T12:00:00Z, 2h.
    #[arg(long, value_parser = select::time, group = "which", required_unless_present_any = ["event_type", "event"])]
    since: Option<DateTime<Utc>>,
    /// Events of this type.
    #[arg(long = "type", value_parser = select::name, group = "which")]
    event_type: Option<String>,
    /// The event with this id; may be given several times.
    #[arg(long, group = "which")]
    event: Vec<Uuid>,
    /// Only says how many that would be.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    by: select::Who,
}

pub(crate) async fn run(outbox: &Outbox, command: Subscriptions) -> Answer {
    match command {
        Subscriptions::List => list(outbox).await,
        Subscriptions::Remove { subscription, yes, by } => remove(outbox, &subscription, yes, by).await,
    }
}

async fn list(outbox: &Outbox) -> Answer {
    let found = subscriptions::Entity::find().order_by_asc(subscriptions::Column::Name).all(outbox.reader()).await?;
    let rows = found.iter().map(|each| {
        let types = each.filter["types"].as_array().filter(|types| !types.is_empty());
        let types = types.map(|types| types.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "));
        let ordering = each.ordering.as_str().map_or_else(|| each.ordering.to_string(), str::to_owned);
        [
            each.name.clone(),
            types.unwrap_or_else(|| "*".to_owned()),
            ordering,
            time(each.created_at),
            or_dash(each.paused_at.map(time)),
        ]
    });
    let text = table(["subscription", "events", "ordering", "since", "paused at"], rows);
    let items: Vec<Value> = found
        .iter()
        .map(|each| {
            json!({
                "name": each.name,
                "filter": each.filter,
                "ordering": each.ordering,
                "created_at": each.created_at,
                "paused_at": each.paused_at,
            })
        })
        .collect();
    Ok(Output::new(text, json!({ "items": items, "next": null })))
}

async fn remove(outbox: &Outbox, name: &str, yes: bool, by: select::Who) -> Answer {
    let status = outbox.backlog().await?.into_iter().find(|each| each.name == name);
    let status = status.ok_or_else(|| select::no_subscription(name))?;
    if status.pending + status.dead > 0 && !yes {
        let (pending, dead) = (status.pending, status.dead);
        return Err(format!(
            "the subscription {name:?} has {pending} deliveries that are not finished and {dead} dead letters, which would \
             be lost; add --yes to remove it nevertheless"
        )
        .into());
    }
    let removed = outbox.remove_as(name, &by.by()).await?;
    Ok(Output::new(format!("removed {name}\n"), json!({ "changed": u8::from(removed) })))
}

pub(crate) async fn pause(outbox: &Outbox, name: &str, by: select::Who) -> Answer {
    let changed = outbox.pause_as(name, &by.by()).await?.ok_or_else(|| select::no_subscription(name))?;
    Ok(one(changed, format!("paused {name}"), format!("{name} was paused already")))
}

pub(crate) async fn resume(outbox: &Outbox, name: &str, by: select::Who) -> Answer {
    let changed = outbox.resume_as(name, &by.by()).await?.ok_or_else(|| select::no_subscription(name))?;
    Ok(one(changed, format!("resumed {name}"), format!("{name} was not paused")))
}

pub(crate) async fn due(outbox: &Outbox, name: &str, by: select::Who) -> Answer {
    let changed = outbox.make_due(name, &by.by()).await?.ok_or_else(|| select::no_subscription(name))?;
    Ok(Output::new(format!("made due: {changed}\n"), json!({ "changed": changed })))
}

fn one(changed: bool, done: String, already: String) -> Output {
    Output::new(if changed { done } else { already } + "\n", json!({ "changed": u8::from(changed) }))
}

pub(crate) async fn replay(outbox: &Outbox, replay: Replay) -> Answer {
    let which = match (replay.since, replay.event_type) {
        (Some(since), _) => outbox_seaorm::Replay::Since(since),
        (None, Some(event_type)) => outbox_seaorm::Replay::EventType(event_type),
        (None, None) => outbox_seaorm::Replay::Events(replay.event),
    };
    let done = outbox.replay(&replay.subscription, &which, replay.dry_run, &replay.by.by()).await?;
    let done = done.ok_or_else(|| select::no_subscription(&replay.subscription))?;
    Ok(dead::changed(done, replay.dry_run, "replayed"))
}
