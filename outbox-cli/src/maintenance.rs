//! Purging, migrating, and looking for what is wrong.

use std::{collections::HashSet, time::Duration};

use clap::{Args, Subcommand};
use outbox_migrations::{
    MigrateError,
    sea_orm_migration::{MigrationTrait, MigratorTrait},
};
use outbox_seaorm::{Outbox, Retention, SchemaError};
use serde_json::json;

use crate::{
    Answer,
    output::{Output, table},
    select,
};

/// What the oldest delivery may wait before the doctor wonders.
const PATIENCE: f64 = 300.0;

/// A log of SQLite that is larger cannot be begun anew at this moment.
const LARGE_LOG: u64 = 64 << 20;

#[derive(Args)]
pub(crate) struct Purge {
    /// How long events are kept after their last delivery: 7d, 12h, 0s.
    #[arg(long, value_parser = select::duration, default_value = "7d")]
    older_than: Duration,
    /// Another time for some types: audit.*=30d. May be given several times; the first that fits counts.
    #[arg(long = "keep", value_parser = rule)]
    rules: Vec<(String, Duration)>,
    /// Writes them to the archive table first.
    #[arg(long)]
    archive: bool,
}

#[derive(Clone, Copy, Subcommand)]
pub(crate) enum Migrate {
    /// Brings the tables to this version.
    Up,
    /// Takes the tables away, with everything in them.
    Down {
        /// Also if there are events.
        #[arg(long)]
        yes: bool,
    },
    /// Says which migrations are applied.
    Status,
}

/// The outbox alone; an application has a migrator of its own that includes these.
struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

fn rule(text: &str) -> Result<(String, Duration), String> {
    let (pattern, time) = text.split_once('=').ok_or("write it as TYPE=TIME, for example audit.*=30d")?;
    Retention::default().keep_events(pattern, Duration::ZERO).map_err(|error| error.to_string())?;
    Ok((pattern.to_owned(), select::duration(time)?))
}

pub(crate) async fn purge(outbox: &Outbox, purge: Purge) -> Answer {
    let mut retention = Retention::default().keep(purge.older_than);
    for (pattern, time) in &purge.rules {
        retention = retention.keep_events(pattern, *time)?;
    }
    if purge.archive {
        retention = retention.archive();
    }
    let purged = outbox.purge(&retention).await?;
    let text = format!(
        "events: {}, deliveries: {}, archived: {}, inbox: {}\n",
        purged.events, purged.deliveries, purged.archived, purged.inbox
    );
    Ok(Output::new(text, purged))
}

pub(crate) async fn migrate(url: &str, command: Migrate) -> Answer {
    // Without a mode, SQLite refuses a file that does not exist yet.
    let creates = matches!(command, Migrate::Up) && url.starts_with("sqlite:") && !url.contains("mode=");
    let url =
        if creates { format!("{url}{}mode=rwc", if url.contains('?') { '&' } else { '?' }) } else { url.to_owned() };
    let outbox = Outbox::connect(&url, 1).await?;
    match command {
        Migrate::Up => outbox_migrations::up::<Migrator>(outbox.writer()).await.map_err(ours)?,
        Migrate::Down { yes } => {
            if !yes && outbox.check_schema().await.is_ok() && has_events(&outbox).await? {
                return Err("this takes away all events and deliveries; add --yes if you mean it".into());
            }
            let steps = u32::try_from(Migrator::migrations().len()).unwrap_or(u32::MAX);
            outbox_migrations::down::<Migrator>(outbox.writer(), steps).await.map_err(ours)?;
        }
        Migrate::Status => {}
    }
    let applied: HashSet<String> = match outbox.check_schema().await {
        Err(error @ SchemaError::Unanswered(_)) => return Err(error.into()),
        Err(SchemaError::Missing(_)) => HashSet::new(),
        _ => Migrator::get_migration_models(outbox.writer()).await?.into_iter().map(|model| model.version).collect(),
    };
    let known = Migrator::migrations();
    let state = |name: &str| if applied.contains(name) { "applied" } else { "pending" };
    let rows = known.iter().map(|each| [each.name().to_owned(), state(each.name()).to_owned()]);
    let json: Vec<_> = known.iter().map(|each| json!({ "name": each.name(), "state": state(each.name()) })).collect();
    Ok(Output::new(table(["migration", "state"], rows), json!({ "items": json, "next": null })))
}

async fn has_events(outbox: &Outbox) -> Result<bool, sea_orm::DbErr> {
    Ok(!outbox.events(&outbox_seaorm::EventFilter::default(), None, 1).await?.rows().is_empty())
}

/// Migrations that are not ours are more likely those of an application than those of a later version.
fn ours(error: MigrateError) -> Box<dyn std::error::Error> {
    match error {
        MigrateError::NewerDatabase { newest } => format!(
            "the database has the migration {newest:?}, which is not the outbox' own: an application migrates this \
             database, so use its command, or the outbox is from a later version"
        )
        .into(),
        error => error.into(),
    }
}

/// In seconds.
const ROUTED_WITHIN: f64 = 30.0;

pub(crate) async fn doctor(outbox: &Outbox) -> Answer {
    let status = outbox.status().await?;
    let mut found = Vec::new();
    let mut note = |what: String, to_do: &str| found.push([what, to_do.to_owned()]);
    for each in &status.subscriptions {
        let name = &each.name;
        let workers = status
            .workers
            .iter()
            .filter(|worker| worker.is_alive())
            .filter(|worker| worker.subscriptions.contains(name))
            .count();
        if workers == 0 {
            note(format!("no worker delivers {name}"), "start one; if nobody needs it: outbox subscriptions remove");
        }
        if each.paused {
            note(format!("{name} is paused"), "outbox resume");
        }
        if each.circuit != "closed" {
            note(format!("the destination of {name} is down (circuit {})", each.circuit), "mend the destination");
        }
        if each.dead > 0 {
            note(format!("{name} has {} dead letters", each.dead), "outbox dead list, then replay or discard");
        }
        if let Some(age) = each.oldest_pending_age_seconds.filter(|age| *age > PATIENCE) {
            note(format!("the oldest delivery of {name} waits for {age:.0} s"), "outbox events list, then outbox why");
        }
    }
    for worker in status.workers.iter().filter(|worker| worker.is_alive()) {
        for name in &worker.removed {
            let to_do = "start it again to register the subscription anew, or without it";
            note(format!("worker {} delivers {name}, which was removed", worker.id), to_do);
        }
        for name in &worker.disagrees {
            let to_do = "outbox subscriptions list; bring its program to the version of the others, or end theirs";
            note(format!("worker {} has another definition of {name} than the one that counts", worker.id), to_do);
        }
    }
    for late in outbox.postponed().await? {
        let (name, keys, hours) = (&late.subscription, late.keys, late.seconds / 3600.0);
        let problem = format!("{keys} deliveries of {name} wait for up to {hours:.1} h, which no delay explains");
        note(problem, "see whether the clock of the database was ahead; outbox due");
    }
    if let Some(log) = outbox.write_ahead_log().filter(|log| *log > LARGE_LOG) {
        let to_do =
            "find who has the file open for long, for example with `fuser`: a backup, a console, a stopped program";
        note(format!("the write-ahead log is {} MiB: a reader keeps an old snapshot", log >> 20), to_do);
    }
    let unrouted = &status.unrouted;
    let has_worker = status.workers.iter().any(outbox_seaorm::WorkerStatus::is_alive);
    if unrouted.waiting > 0 && !has_worker {
        note(
            format!("{} events are not routed to subscriptions, and no worker is running", unrouted.waiting),
            "start a worker, or route them once: outbox unrouted route",
        );
    } else if unrouted.oldest_age_seconds.is_some_and(|age| age > ROUTED_WITHIN) {
        note(
            format!("{} events are not routed although a worker is running", unrouted.waiting),
            "look for a session that locks rows of the outbox, and at the log of the worker",
        );
    }
    if unrouted.set_aside > 0 {
        note(
            format!("{} events could not be routed and were set aside", unrouted.set_aside),
            "outbox unrouted list, then put-back or discard",
        );
    }
    if status.subscriptions.is_empty() {
        note("there are no subscriptions: events go nowhere".to_owned(), "start a worker");
    }
    found.extend(outbox.checkup().await?.into_iter().map(|each| [each.problem, each.to_do]));
    let problems: Vec<_> = found.iter().map(|[what, to_do]| json!({ "problem": what, "to_do": to_do })).collect();
    let text =
        if found.is_empty() { "all is well\n".to_owned() } else { table(["problem", "what to do"], found.clone()) };
    Ok(Output::new(text, json!({ "problems": problems })).bad(!found.is_empty()))
}
