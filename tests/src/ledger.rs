//! What clients of the conformance application saw, compared with what is stored and with what arrived.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_seaorm::Outbox;
use reqwest::{Client, Response};
use sea_orm::{ConnectionTrait, DbBackend, QueryResult, Statement};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{eventually, sink::Sink, texts};

/// What the client of an op saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A success.
    Ok,
    /// A definite failure.
    No,
    /// Cut off, timed out, or told that nobody knows.
    Unknown,
}

impl Answer {
    /// What a response says, if one came.
    #[must_use]
    pub fn of(response: &Result<Response, reqwest::Error>) -> Self {
        let Ok(response) = response else { return Self::Unknown };
        Self::of_parts(
            response.status().as_u16(),
            response.headers().get("outbox-outcome").and_then(|value| value.to_str().ok()),
        )
    }

    /// What a status with this `outbox-outcome` says.
    #[must_use]
    pub fn of_parts(status: u16, outcome: Option<&str>) -> Self {
        match (status, outcome) {
            (_, Some("unknown")) => Self::Unknown,
            (..400, _) => Self::Ok,
            _ => Self::No,
        }
    }
}

/// Remembers for each op how many events it has and what its client saw. Clones are the same ledger.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    ops: Arc<Mutex<HashMap<String, (u32, Answer)>>>,
    targets: Arc<Mutex<Vec<String>>>,
    stopped: Arc<AtomicBool>,
    successes: Arc<AtomicUsize>,
    times: Arc<Mutex<Vec<Duration>>>,
}

/// The kinds of ops that a load is made of.
#[derive(Clone, Debug)]
pub struct Load {
    /// How many clients send one op after another.
    pub clients: usize,
    /// How many keys they choose from.
    pub keys: u32,
    /// How long a transaction sleeps before its commit, in milliseconds.
    pub sleeps: Range<u64>,
    /// One of how many ops asks for a rollback; 0 means none.
    pub rolled_back: u8,
}

impl Default for Load {
    fn default() -> Self {
        Self { clients: 4, keys: 20, sleeps: 0..1, rolled_back: 0 }
    }
}

impl Load {
    fn mode(&self) -> String {
        if self.rolled_back > 0 && fastrand::u8(..self.rolled_back) == 0 {
            return "status:418".to_owned();
        }
        match fastrand::u64(self.sleeps.clone()) {
            0 => "ok".to_owned(),
            ms => format!("sleep_after:{ms}"),
        }
    }
}

impl Ledger {
    /// Where clients send their ops from now on: one of these, by chance.
    pub fn send_to(&self, urls: &[&str]) {
        *lock(&self.targets) = urls.iter().map(|url| (*url).to_owned()).collect();
    }

    /// Sends ops until [`stop`](Self::stop), whatever the answers are.
    #[must_use]
    pub fn load(&self, load: &Load) -> JoinSet<()> {
        let mut running = JoinSet::new();
        for _ in 0..load.clients {
            let (ledger, load) = (self.clone(), load.clone());
            running.spawn(async move {
                let http = Client::builder().timeout(Duration::from_secs(30)).build().expect("a client");
                while !ledger.stopped.load(Ordering::SeqCst) {
                    let url = fastrand::choice(lock(&ledger.targets).iter()).cloned();
                    let Some(url) = url else {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                        continue;
                    };
                    let (op, n) = (format!("{:016x}", fastrand::u64(..)), fastrand::u32(1..4));
                    let body = op_body(&op, &format!("k{}", fastrand::u32(..load.keys)), n, &load.mode());
                    // In the ledger before it is sent: what is cut off may be stored.
                    ledger.note(&op, n, Answer::Unknown);
                    let sent = Instant::now();
                    let answer = Answer::of(&http.post(format!("{url}/op")).json(&body).send().await);
                    lock(&ledger.times).push(sent.elapsed());
                    ledger.note(&op, n, answer);
                    if answer == Answer::Unknown {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
            });
        }
        running
    }

    /// Ends all loads after the ops under way.
    pub async fn stop(&self, load: JoinSet<()>) {
        self.stopped.store(true, Ordering::SeqCst);
        load.join_all().await;
    }

    /// Writes down what the client of an op of `n` events saw.
    pub fn note(&self, op: &str, n: u32, answer: Answer) {
        lock(&self.ops).insert(op.to_owned(), (n, answer));
        if answer == Answer::Ok {
            self.successes.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How many ops succeeded so far.
    #[must_use]
    pub fn successes(&self) -> usize {
        self.successes.load(Ordering::SeqCst)
    }

    /// How many ops have this answer.
    #[must_use]
    pub fn count(&self, answer: Answer) -> usize {
        lock(&self.ops).values().filter(|(_, each)| *each == answer).count()
    }

    /// What 99 of 100 ops of the loads that ended since the last call did not take longer than.
    ///
    /// # Panics
    ///
    /// If no op has ended.
    #[must_use]
    pub fn p99(&self) -> Duration {
        let mut times = std::mem::take(&mut *lock(&self.times));
        times.sort_unstable();
        *times.get(times.len() * 99 / 100).expect("ops have ended")
    }

    /// Waits until an op succeeds that was sent after this call: service is back.
    pub async fn serves_again(&self, limit: Duration) -> Duration {
        let (started, clients) = (Instant::now(), 64);
        // Those that are under way may have been sent before.
        let enough = self.successes() + clients;
        eventually(limit, "ops succeed again", || async { self.successes() >= enough }).await;
        started.elapsed()
    }

    /// Waits until every delivery has ended, then compares.
    pub async fn audit(&self, outbox: &Outbox, sink: &Sink, limit: Duration) -> Report {
        let deadline = Instant::now() + limit;
        let left = "select cast(subscription_id as text) || '/' || key from outbox_lanes
                    union all select 'unrouted ' || cast(position as text) from outbox_unrouted";
        let mut stuck = texts(outbox, left).await;
        while !stuck.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
            stuck = texts(outbox, left).await;
        }
        self.compare(outbox, sink, stuck).await
    }

    async fn compare(&self, outbox: &Outbox, sink: &Sink, stuck: Vec<String>) -> Report {
        let stored: HashSet<String> =
            texts(outbox, "select op from orders where key <> 'direct'").await.into_iter().collect();
        let events = rows(
            outbox,
            "select cast(position as text) as position, payload->>'op' as op, cast(payload->>'i' as bigint) as i
               from outbox_events where event_type = 'order.placed'",
        )
        .await;
        let dead = texts(
            outbox,
            "select s.name || ' ' || cast(d.position as text) from outbox_dead_letters d
               join outbox_subscriptions s on s.id = d.subscription_id",
        )
        .await;
        let dead: HashSet<String> = dead.into_iter().collect();
        let effects = rows(outbox, "select op, i, applied from effects").await;
        let applied: HashMap<(String, i64), i64> =
            effects.iter().map(|row| ((text(row, "op"), number(row, "i")), number(row, "applied"))).collect();
        let arrived: HashSet<(String, i64)> =
            sink.first_arrivals().iter().map(|event| of_data(&event["data"])).collect();

        let mut report = Report { stuck, bytes: sink.refused(), ..Report::default() };
        let mut parts: HashMap<String, HashSet<i64>> = HashMap::new();
        for row in &events {
            let (position, event) = (text(row, "position"), (text(row, "op"), number(row, "i")));
            for (subscription, has_it) in
                [("sink", arrived.contains(&event)), ("effects", applied.contains_key(&event))]
            {
                if !has_it && !dead.contains(&format!("{subscription} {position}")) {
                    report.lost.push(format!("{subscription}: {event:?}"));
                }
            }
            if !stored.contains(&event.0) {
                report.ghost.push(format!("event {event:?}"));
            }
            parts.entry(event.0).or_default().insert(event.1);
        }
        let come = arrived.iter().chain(applied.keys());
        report.ghost.extend(come.filter(|(op, _)| !stored.contains(op)).map(|event| format!("arrival {event:?}")));
        let twice = applied.iter().filter(|(_, times)| **times > 1);
        report.dup_effect.extend(twice.map(|(event, times)| format!("{event:?}: {times}")));
        for (key, numbers) in sink.numbers() {
            if !numbers.is_sorted() {
                report.order.push(format!("{key}: {numbers:?}"));
            }
        }
        for (op, (n, answer)) in lock(&self.ops).iter() {
            let events = parts.get(op).map_or(0, HashSet::len);
            match (stored.contains(op), answer) {
                (false, Answer::Ok) => report.lie_plus.push(op.clone()),
                (true, Answer::No) => report.lie_minus.push(op.clone()),
                _ => {}
            }
            if stored.contains(op) && events != *n as usize {
                report.partial.push(format!("{op}: {events} of {n}"));
            }
        }
        if outbox.reader().get_database_backend() == DbBackend::Postgres {
            report.leak = texts(outbox, LEAKS).await;
        }
        report
    }
}

/// What the connections of a test call themselves, so that they are not taken for those of the application.
pub const WITNESS: &str = "witness";

/// Sessions that have been idle in a transaction for a second.
const LEAKS: &str = "select pid || ': ' || query from pg_stat_activity
     where datname = current_database() and application_name <> 'witness' and state like 'idle in transaction%'
       and state_change < clock_timestamp() - interval '1 second'";

/// The body of `POST /op`.
#[must_use]
pub fn op_body(op: &str, key: &str, n: u32, mode: &str) -> Value {
    json!({ "op": op, "key": key, "n": n, "mode": mode, "arg": "" })
}

/// What did not come out as it should, with examples. All of it is empty when every promise was kept.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Events of committed ops that neither arrived nor are dead letters.
    pub lost: Vec<String>,
    /// Events and arrivals of ops that are not stored.
    pub ghost: Vec<String>,
    /// Ops that were confirmed and are not stored.
    pub lie_plus: Vec<String>,
    /// Ops that were refused and are stored.
    pub lie_minus: Vec<String>,
    /// Stored ops without all of their events.
    pub partial: Vec<String>,
    /// Effects that were applied more than once.
    pub dup_effect: Vec<String>,
    /// Keys whose events arrived out of order.
    pub order: Vec<String>,
    /// Lanes that were left.
    pub stuck: Vec<String>,
    /// Sessions idle in a transaction.
    pub leak: Vec<String>,
    /// Arrivals with a wrong signature.
    pub bytes: usize,
}

impl Report {
    /// Fails unless all is as it should be.
    ///
    /// # Panics
    ///
    /// With what is not.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert!(*self == Self::default(), "{self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, ghost, lie_plus, lie_minus, partial, dup_effect, order, stuck, leak, bytes } = self;
        for (name, found) in [
            ("LOST", lost),
            ("GHOST", ghost),
            ("LIE+", lie_plus),
            ("LIE-", lie_minus),
            ("PARTIAL", partial),
            ("DUP_EFFECT", dup_effect),
            ("ORDER", order),
            ("STUCK", stuck),
            ("LEAK", leak),
        ] {
            let some: Vec<_> = found.iter().take(3).collect();
            writeln!(
                f,
                "{name:10} {:6} {}",
                found.len(),
                if some.is_empty() { String::new() } else { format!("{some:?}") }
            )?;
        }
        write!(f, "{:10} {bytes:6}", "BYTES")
    }
}

fn of_data(data: &Value) -> (String, i64) {
    (data["op"].as_str().unwrap_or_default().to_owned(), data["i"].as_i64().unwrap_or(-1))
}

async fn rows(outbox: &Outbox, sql: &str) -> Vec<QueryResult> {
    let db = outbox.reader();
    let statement = Statement::from_string(db.get_database_backend(), sql);
    db.query_all_raw(statement).await.expect("the query runs")
}

fn text(row: &QueryResult, column: &str) -> String {
    row.try_get("", column).expect("a text")
}

fn number(row: &QueryResult, column: &str) -> i64 {
    row.try_get("", column).expect("a number")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
