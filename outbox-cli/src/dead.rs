use chrono::{DateTime, Utc};
use clap::{Args, Subcommand};
use outbox_seaorm::{Changed, DeadLetter, DeadLetterFilter, Outbox};
use serde_json::{Value, json};

use crate::{
    Answer,
    output::{Output, or_dash, plain, table, time},
    select,
};

#[derive(Subcommand)]
pub(crate) enum Dead {
    /// Lists them, the newest first.
    List {
        #[command(flatten)]
        filter: Filter,
        /// The next page: what the page before gave as `next`.
        #[arg(long)]
        cursor: Option<i64>,
        /// At most this many.
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// Shows one with its attempts.
    Show {
        /// The id of the dead letter.
        id: i64,
    },
    /// Delivers them again, at once and with all their attempts.
    Replay(Selected),
    /// Gives them up for good; keys that they hold up go on.
    Discard(Selected),
}

#[derive(Args, Default)]
pub(crate) struct Filter {
    /// Only those of this subscription.
    #[arg(long, value_parser = select::subscription)]
    subscription: Option<String>,
    /// Only those of events of this type.
    #[arg(long = "type", value_parser = select::name)]
    event_type: Option<String>,
    /// Only those that died since this time, or since so long ago: 2026-01-31T12:00:00Z, 2h.
    #[arg(long, value_parser = select::time)]
    since: Option<DateTime<Utc>>,
    /// Only those that died before this time.
    #[arg(long, value_parser = select::time)]
    until: Option<DateTime<Utc>>,
}

#[derive(Args)]
pub(crate) struct Selected {
    /// The ids of the dead letters; or a filter, or --all.
    ids: Vec<i64>,
    #[command(flatten)]
    filter: Filter,
    /// All dead letters that there are.
    #[arg(long)]
    all: bool,
    /// Only says how many that would be.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    by: select::Who,
}

impl Default for Dead {
    fn default() -> Self {
        Self::List { filter: Filter::default(), cursor: None, limit: 50 }
    }
}

pub(crate) async fn run(outbox: &Outbox, command: Dead) -> Answer {
    match command {
        Dead::List { filter, cursor, limit } => list(outbox, filter, cursor, limit).await,
        Dead::Show { id } => show(outbox, id).await,
        Dead::Replay(selected) => {
            let filter = selected.filter(outbox).await?;
            let done = outbox.replay_dead_letters(&filter, selected.dry_run, &selected.by.by()).await?;
            Ok(changed(done, selected.dry_run, "replayed"))
        }
        Dead::Discard(selected) => {
            let filter = selected.filter(outbox).await?;
            let done = outbox.discard_dead_letters(&filter, selected.dry_run, &selected.by.by()).await?;
            Ok(changed(done, selected.dry_run, "discarded"))
        }
    }
}

pub(crate) fn changed(done: Changed, dry_run: bool, how: &str) -> Output {
    let text = match (dry_run, done.matched - done.changed.min(done.matched)) {
        (true, _) => format!("would be {how}: {}\n", done.matched),
        (false, 0) => format!("{how}: {}\n", done.changed),
        (false, left) => {
            format!("{how}: {}; left: {left}, whose event is gone or that somebody else has changed\n", done.changed)
        }
    };
    Output::new(text, done)
}

async fn list(outbox: &Outbox, filter: Filter, cursor: Option<i64>, limit: u32) -> Answer {
    let filter = filter.of(outbox, None).await?;
    let mut found = outbox.dead_letters(&filter, cursor, limit.saturating_add(1)).await?;
    let more = found.len() > limit as usize;
    found.truncate(limit as usize);
    let next = found.last().filter(|_| more).map(|dead| dead.id.to_string());
    let rows = found.iter().map(|dead| {
        [
            dead.id.to_string(),
            time(dead.died_at),
            dead.subscription.clone(),
            or_dash(dead.event_type.as_ref()),
            aggregate(dead),
            dead.attempts.to_string(),
            dead.error.clone(),
        ]
    });
    let mut text = table(["id", "died at", "subscription", "type", "aggregate", "attempts", "error"], rows);
    if let Some(next) = &next {
        text += &format!("more: --cursor {next}\n");
    }
    Ok(Output::new(text, json!({ "items": found, "next": next })))
}

async fn show(outbox: &Outbox, id: i64) -> Answer {
    let filter = DeadLetterFilter { ids: Some(vec![id]), ..DeadLetterFilter::default() };
    let found = outbox.dead_letters(&filter, None, 1).await?.pop();
    let dead = found.ok_or_else(|| format!("there is no dead letter {id}; `outbox dead list` lists them"))?;
    let mut text = format!(
        "dead letter {id} of {}: {} of {}, event {}\ndied at {} after {} attempts: {}\n\n",
        dead.subscription,
        or_dash(dead.event_type.as_ref()),
        aggregate(&dead),
        or_dash(dead.event_id),
        time(dead.died_at),
        dead.attempts,
        plain(&dead.error),
    );
    let cell = |entry: &Value, name: &str| match &entry[name] {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let rows = dead
        .attempt_log
        .iter()
        .map(|entry| ["attempt", "at", "worker", "milliseconds", "error"].map(|name| cell(entry, name)));
    text += &table(["attempt", "at", "worker", "ms", "error"], rows);
    let mut shown = json!(dead);
    shown["attempt_log"] = json!(dead.attempt_log);
    Ok(Output::new(text, shown))
}

fn aggregate(dead: &DeadLetter) -> String {
    let parts = dead.aggregate_type.as_ref().zip(dead.aggregate_id.as_ref());
    or_dash(parts.map(|(aggregate, id)| format!("{aggregate}/{id}")))
}

impl Filter {
    fn is_empty(&self) -> bool {
        self.subscription.is_none() && self.event_type.is_none() && self.since.is_none() && self.until.is_none()
    }

    async fn of(&self, outbox: &Outbox, ids: Option<Vec<i64>>) -> Result<DeadLetterFilter, Box<dyn std::error::Error>> {
        if let Some(name) = &self.subscription
            && !outbox.is_registered(name).await?
        {
            return Err(select::no_subscription(name).into());
        }
        Ok(DeadLetterFilter {
            ids,
            subscription: self.subscription.clone(),
            event_type: self.event_type.clone(),
            since: self.since,
            until: self.until,
        })
    }
}

impl Selected {
    /// Nothing given must not mean everything.
    async fn filter(&self, outbox: &Outbox) -> Result<DeadLetterFilter, Box<dyn std::error::Error>> {
        if self.ids.is_empty() && self.filter.is_empty() && !self.all {
            return Err(
                "which dead letters? give their ids, a filter (--subscription, --type, --since, --until), or --all"
                    .into(),
            );
        }
        let ids = (!self.ids.is_empty()).then(|| self.ids.clone());
        self.filter.of(outbox, ids).await
    }
}
