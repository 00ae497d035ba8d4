use std::time::{Duration, Instant};

use outbox_core::{InvalidPattern, TypePattern};
use sea_orm::{DbBackend, DbErr, Value};
use serde::Serialize;

use crate::{
    Outbox,
    flush::{json, seconds},
};

/// How many events one transaction takes. A few milliseconds on SQLite, where nothing else is written meanwhile.
const BATCH: u64 = 1000;

/// How long events and their history are kept after the last delivery.
const DEFAULT_KEEP: Duration = Duration::from_secs(7 * 24 * 3600);

/// The shortest time that events are kept on PostgreSQL: whoever finds out about a COMMIT whose answer was lost looks for
/// its event.
const SHORTEST: Duration = Duration::from_secs(60);

/// The shortest time that the inbox is kept: an attempt that was overtaken may still be under way.
const SHORTEST_INBOX: Duration = Duration::from_secs(3600);

/// How long what is finished is kept.
///
/// An event goes when it is older than that, everybody has had it for that long, and nobody waits for it: not while one of
/// its deliveries is pending, leased or a dead letter, however old it is. Its history goes with it. Zero means that
/// nothing is kept that is delivered; on PostgreSQL it stays for a minute in any case.
///
/// ```
/// use std::time::Duration;
///
/// use outbox_seaorm::Retention;
///
/// let day = Duration::from_secs(24 * 3600);
/// let retention = Retention::default().keep(2 * day).keep_events("audit.*", 30 * day)?.archive();
/// # Ok::<(), outbox_core::InvalidPattern>(())
/// ```
#[derive(Clone, Debug)]
pub struct Retention {
    keep: Duration,
    rules: Vec<(TypePattern, Duration)>,
    archive: bool,
    inbox: Option<Duration>,
}

/// What a purge has taken out of the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Purged {
    /// Events.
    pub events: u64,
    /// Deliveries of the history.
    pub deliveries: u64,
    /// How many of the events were written to the archive.
    pub archived: u64,
    /// Entries of the inbox.
    pub inbox: u64,
}

/// As the statements take it: the first whose name is the type, or its beginning, counts.
#[derive(Serialize)]
struct Rule {
    name: String,
    prefix: bool,
    seconds: f64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { keep: DEFAULT_KEEP, rules: Vec::new(), archive: false, inbox: None }
    }
}

impl Retention {
    /// Sets how long events are kept that no other rule is for. Defaults to 7 days; zero keeps no history.
    #[must_use]
    pub fn keep(mut self, time: Duration) -> Self {
        self.keep = time;
        self
    }

    /// Sets how long events of these types are kept: exact (`todo.created`) or by prefix (`todo.*`). The first rule that
    /// fits an event counts.
    ///
    /// # Errors
    ///
    /// [`InvalidPattern`] if it is none of these.
    pub fn keep_events(mut self, pattern: &str, time: Duration) -> Result<Self, InvalidPattern> {
        self.rules.push((pattern.parse()?, time));
        Ok(self)
    }

    /// Writes events to the table `outbox_archive` in the transaction that takes them away. Defaults to not.
    #[must_use]
    pub fn archive(mut self) -> Self {
        self.archive = true;
        self
    }

    /// Sets how long the inbox remembers events that are gone here. Defaults to the longest time that events are kept, and
    /// an hour at least. Events that are still here are remembered in any case.
    #[must_use]
    pub fn inbox(mut self, time: Duration) -> Self {
        self.inbox = Some(time);
        self
    }

    /// The shortest time that events of any type are kept.
    #[must_use]
    pub fn shortest(&self) -> Duration {
        self.rules.iter().map(|(_, time)| *time).fold(self.keep, Duration::min)
    }

    fn longest(&self) -> Duration {
        self.rules.iter().map(|(_, time)| *time).fold(self.keep, Duration::max)
    }

    fn rules(&self, at_least: Duration) -> Vec<Rule> {
        let rule = |pattern: &TypePattern, time: Duration| {
            let text = pattern.to_string();
            let (name, prefix) = text.strip_suffix('*').map_or((text.as_str(), false), |prefix| (prefix, true));
            Rule { name: name.to_owned(), prefix, seconds: seconds(time.max(at_least)) }
        };
        let rest = Rule { name: String::new(), prefix: true, seconds: seconds(self.keep.max(at_least)) };
        self.rules.iter().map(|(pattern, time)| rule(pattern, *time)).chain([rest]).collect()
    }
}

impl Outbox {
    /// Takes away what is older than the retention. Any number of processes may do it at once.
    ///
    /// Works in transactions of up to a thousand events, with a pause after each that is as long as it was, so that claims
    /// and commits have their turn. Takes no lock that they wait for on PostgreSQL.
    ///
    /// # Errors
    ///
    /// If the database fails; what was done until then stays done.
    ///
    /// # Cancel safety
    ///
    /// Safe, as is a crash: each transaction happens or not.
    pub async fn purge(&self, retention: &Retention) -> Result<Purged, DbErr> {
        let mut purged = Purged::default();
        let mut from = String::new();
        loop {
            let started = Instant::now();
            let Some(last) = self.store().until_given_up(self.purge_events(retention, &from, &mut purged)).await?
            else {
                break;
            };
            from = last;
            tokio::time::sleep(started.elapsed()).await;
        }
        let inbox = retention.inbox.unwrap_or_else(|| retention.longest().max(SHORTEST_INBOX));
        loop {
            let started = Instant::now();
            let values = [seconds(inbox).into(), BATCH.into()];
            let gone = self.execute(self.store(), self.sql().purge_inbox, values).await?;
            purged.inbox += gone;
            if gone < BATCH {
                return Ok(purged);
            }
            tokio::time::sleep(started.elapsed()).await;
        }
    }

    /// One batch. Returns the time of its last event; `None` if there was nothing more.
    async fn purge_events(
        &self,
        retention: &Retention,
        from: &str,
        purged: &mut Purged,
    ) -> Result<Option<String>, DbErr> {
        let at_least = if self.backend() == DbBackend::Postgres { SHORTEST } else { Duration::ZERO };
        let rules: Value = json(&retention.rules(at_least))?.into();
        let tx = self.begin_write().await?;
        let values = [rules.clone(), seconds(retention.shortest().max(at_least)).into(), from.into(), BATCH.into()];
        let rows = self.query_all(&tx, self.sql().old_events, values).await?;
        let Some(last) = rows.last() else { return Ok(None) };
        let last: String = last.try_get("", "recorded_at")?;
        let found = rows.iter().map(|row| row.try_get::<i64>("", "position")).collect::<Result<Vec<_>, _>>()?;
        // Locked now, so nobody begins to need them; somebody may have before.
        let rows = self.query_all(&tx, self.sql().still_old, [rules, json(&found)?.into()]).await?;
        let old = rows.iter().map(|row| row.try_get::<i64>("", "position")).collect::<Result<Vec<_>, _>>()?;
        let positions: Value = json(&old)?.into();
        let archived = match retention.archive {
            true => self.execute(&tx, self.sql().archive_events, [positions.clone()]).await?,
            false => 0,
        };
        let deliveries = self.execute(&tx, self.sql().purge_delivered, [positions.clone()]).await?;
        let events = self.execute(&tx, self.sql().purge_events, [positions]).await?;
        tx.commit().await?;
        purged.events += events;
        purged.deliveries += deliveries;
        purged.archived += archived;
        Ok((found.len() as u64 == BATCH && events > 0).then_some(last))
    }
}
