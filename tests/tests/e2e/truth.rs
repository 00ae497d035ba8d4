//! The conformance application on PostgreSQL is cut off, killed, locked out and lied to; the ledger says what came of
//! it. Sizes are those of every run; `OUTBOX_LONG_TESTS=1` makes them those of the promises.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use outbox_seaorm::Outbox;
use outbox_test_servers::{PgBouncer, Postgres};
use outbox_tests::{
    Database, Process, TOKEN, command, eventually,
    ledger::{Answer, Ledger, Load, WITNESS, op_body},
    sink::{SECRET, Sink},
    texts,
};
use reqwest::{Client, StatusCode};
use sea_orm::{ConnectionTrait, TransactionTrait};
use serde_json::{Value, json, value::RawValue};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

/// What operators of the processes log in with.
pub(crate) const OPS_TOKEN: &str = "token-of-the-tests";

/// Short leases, so that what a killed process held is due again soon.
const QUICK: &[(&str, &str)] = &[("OUTBOX_LEASE_MS", "500"), ("OUTBOX_POLL_MS", "50")];

fn is_long() -> bool {
    std::env::var_os("OUTBOX_LONG_TESTS").is_some_and(|value| !value.is_empty() && value != "0")
}

pub(crate) fn sized<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// A database, a sink, a ledger, and the test's own connections.
pub(crate) struct Range {
    pub(crate) url: String,
    pub(crate) sink: Sink,
    sink_url: String,
    pub(crate) ledger: Ledger,
    pub(crate) witness: Outbox,
}

impl Range {
    pub(crate) async fn new() -> Self {
        Self::on(Postgres::shared()).await
    }

    pub(crate) async fn on(server: &Postgres) -> Self {
        let (url, sink) = (server.database(), Sink::default());
        let witness = Database::Postgres(format!("{url}?application_name={WITNESS}")).open().await;
        Self { url, sink_url: sink.start().await, sink, ledger: Ledger::default(), witness }
    }

    pub(crate) async fn start(&self, mode: &str, settings: &[(&str, &str)]) -> Process {
        let own = [
            ("DATABASE_URL", self.url.as_str()),
            ("SINK_URL", &self.sink_url),
            ("WEBHOOK_SECRET", SECRET),
            ("OPS_TOKEN", OPS_TOKEN),
        ];
        let settings: Vec<_> = own.iter().chain(settings).copied().collect();
        Process::start("conformance-app", mode, &settings).await
    }

    /// The port of the sink, for a proxy in front of it.
    pub(crate) fn sink_port(&self) -> u16 {
        let address = self.sink_url.trim_start_matches("http://127.0.0.1:");
        address.split('/').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.witness.writer().execute_unprepared(sql).await.unwrap();
    }

    /// The database's clock can be moved from now on.
    pub(crate) async fn let_the_clock_jump(&self) {
        let name = self.url.rsplit('/').next().unwrap();
        let path = format!("alter database {name} set search_path = public, pg_catalog");
        for sql in [
            "create table jump (by interval)",
            "insert into jump values ('0')",
            "create function clock_timestamp() returns timestamptz language sql volatile as
               'select pg_catalog.clock_timestamp() + by from public.jump'",
            path.as_str(),
        ] {
            self.execute(sql).await;
        }
    }

    pub(crate) async fn jump(&self, by: &str) {
        self.execute(&format!("update jump set by = by + interval '{by}'")).await;
    }

    pub(crate) async fn texts(&self, sql: &str) -> Vec<String> {
        texts(&self.witness, sql).await
    }

    /// Everything arrives, and the ledger is clean.
    pub(crate) async fn assert_clean(&self) {
        let report = self.ledger.audit(&self.witness, &self.sink, Duration::from_secs(60)).await;
        println!(
            "{} ops: {} confirmed, {} refused, {} unknown",
            self.ledger.count(Answer::Ok) + self.ledger.count(Answer::No) + self.ledger.count(Answer::Unknown),
            self.ledger.count(Answer::Ok),
            self.ledger.count(Answer::No),
            self.ledger.count(Answer::Unknown)
        );
        report.assert_clean();
    }

    /// No delivery was given up, and none needed a second attempt: the sink takes everything, and a transactional handler
    /// that fails together with its database gets its attempt back.
    pub(crate) async fn assert_no_attempt_was_burnt(&self) {
        self.assert_nothing_was_given_up().await;
        let burnt =
            "select s.name || ' ' || d.position || ': ' || d.attempts || ' ' || coalesce(d.attempt_log::text, '')
                       from outbox_delivered d join outbox_subscriptions s on s.id = d.subscription_id
                      where d.attempts > 1";
        assert_eq!(self.texts(burnt).await, Vec::<String>::new());
    }

    pub(crate) async fn assert_nothing_was_given_up(&self) {
        assert_eq!(self.texts("select error from outbox_dead_letters").await, Vec::<String>::new());
    }
}

async fn post(url: &str, body: &Value) -> StatusCode {
    Client::new().post(url).json(body).send().await.unwrap().status()
}

/// How a client goes.
#[derive(Clone, Copy)]
enum Leave {
    Close,
    Reset,
    /// Sends no more, and reads on.
    HalfClose,
    /// Stays until it has its answer.
    Stay,
}

/// Sends an op and leaves after a while. Says what the answer was, if one came all the same.
async fn leave(address: &str, body: &Value, leave: Leave) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let body = body.to_string();
    let request = format!(
        "POST /op HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    tokio::time::sleep(Duration::from_micros(fastrand::u64(0..50_000))).await;
    match leave {
        Leave::Close => return None,
        Leave::Reset => {
            stream.set_zero_linger().ok()?;
            return None;
        }
        Leave::HalfClose => stream.shutdown().await.ok()?,
        Leave::Stay => {}
    }
    let (mut answer, mut buffer) = (Vec::new(), [0; 1024]);
    let read = async {
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            answer.extend_from_slice(&buffer[..n]);
            if answer.windows(4).any(|end| end == b"\r\n\r\n") {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), read).await.ok()?;
    let head = String::from_utf8_lossy(&answer);
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let outcome = head.lines().find_map(|line| line.strip_prefix("outbox-outcome: "));
    Some(Answer::of_parts(status, outcome))
}

/// A clean ledger means something: each kind of broken promise is seen.
#[tokio::test]
async fn the_ledger_finds_everything_that_can_go_wrong() {
    let range = Range::new().await;
    let app = range.start("all", &[]).await;
    for op in ["whole", "lost", "ghost", "lied", "partial", "doubled", "refused"] {
        assert_eq!(post(&format!("{}/op", app.http), &op_body(op, op, 2, "ok")).await, StatusCode::CREATED);
        range.ledger.note(op, 2, Answer::Ok);
    }
    range.assert_clean().await;
    drop(app);
    range.ledger.note("refused", 2, Answer::No);
    range.ledger.note("partial", 3, Answer::Ok);
    for sql in [
        "delete from effects where op = 'lost' and i = 0",
        "delete from orders where op in ('ghost', 'lied')",
        "delete from outbox_events where payload->>'op' = 'lied'",
        "delete from effects where op = 'lied'",
        "update effects set applied = 2 where op = 'doubled' and i = 1",
        "insert into outbox_lanes (subscription_id, key, pending, due_at) values (1, 'left', 1, now())",
    ] {
        range.execute(sql).await;
    }
    let report = range.ledger.audit(&range.witness, &range.sink, Duration::ZERO).await;
    let counts =
        [&report.lost, &report.lie_plus, &report.lie_minus, &report.partial, &report.dup_effect, &report.stuck];
    // What was stored of `ghost` and `lied` is gone, and both were confirmed.
    assert_eq!(counts.map(Vec::len), [1, 2, 1, 1, 1, 1], "{report}");
    // Two events of `ghost`, its arrivals at the sink and in the effects, and those of `lied` at the sink.
    assert_eq!(report.ghost.len(), 2 + 4 + 2, "{report}");
}

/// 2,000 clients hang up or half-close within 50 ms on a pool of 4. Afterwards the pool has four good connections: what
/// is written through them without a transaction is there, and no session is in one.
#[tokio::test]
async fn clients_that_hang_up_leave_no_open_transaction_behind() {
    let range = Range::new().await;
    let api = range.start("serve", &[("DB_POOL", "4")]).await;
    let address = api.http.strip_prefix("http://").unwrap().to_owned();
    let mut clients = JoinSet::new();
    for client in 0..50 {
        let (address, ledger) = (address.clone(), range.ledger.clone());
        clients.spawn(async move {
            for n in 0..40 {
                let (op, events) = (format!("{client}-{n}"), fastrand::u32(1..4));
                let modes = ["ok", "ok", "sleep_before:5", "sleep_after:5", "savepoint_rollback", "status:500"];
                let mode = fastrand::choice(modes).unwrap();
                let body = op_body(&op, &format!("k{}", fastrand::u8(..20)), events, mode);
                ledger.note(&op, events, Answer::Unknown);
                let how = fastrand::choice([Leave::Close, Leave::Reset, Leave::HalfClose, Leave::Stay]).unwrap();
                if let Some(answer) = leave(&address, &body, how).await {
                    ledger.note(&op, events, answer);
                }
            }
        });
    }
    clients.join_all().await;
    assert_eq!(
        range.ledger.count(Answer::Ok) + range.ledger.count(Answer::No) + range.ledger.count(Answer::Unknown),
        2000
    );

    let direct: Vec<String> = (0..200).map(|n| format!("direct-{n:03}")).collect();
    for op in &direct {
        assert_eq!(post(&format!("{}/direct", api.http), &json!({ "op": op })).await, StatusCode::CREATED, "{op}");
    }
    assert_eq!(range.texts("select op from orders where key = 'direct'").await, direct);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let idle = "select query from pg_stat_activity
                 where datname = current_database() and state like 'idle in transaction%'";
    assert_eq!(range.texts(idle).await, Vec::<String>::new());

    let _worker = range.start("worker", &[]).await;
    range.assert_clean().await;
    assert!(range.ledger.count(Answer::Unknown) > 500, "hardly anybody hung up");
}

/// The server takes no writes for a while, as during a failover, and has to be asked again and again.
#[tokio::test]
async fn a_database_that_is_read_only_for_a_while_costs_no_attempt() {
    let server = Postgres::start(&[]);
    let range = Range::on(&server).await;
    let mut app = range.start("all", &[("DB_POOL", "4")]).await;
    range.ledger.send_to(&[&app.http]);
    let load = range.ledger.load(&Load::default());
    range.ledger.serves_again(Duration::from_secs(10)).await;
    for _ in 0..2 {
        range.execute("alter system set default_transaction_read_only = on").await;
        range.execute("select pg_reload_conf()").await;
        eventually(Duration::from_secs(10), "writes are refused", || async { range.ledger.count(Answer::No) > 20 })
            .await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        range.execute("alter system reset default_transaction_read_only").await;
        range.execute("select pg_reload_conf()").await;
        println!("back after {:?}", range.ledger.serves_again(Duration::from_secs(10)).await);
    }
    range.ledger.stop(load).await;
    assert!(app.is_running());
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
}

#[tokio::test]
async fn a_table_that_is_locked_for_five_seconds_costs_no_attempt() {
    let range = Range::new().await;
    let mut app = range.start("all", &[("DB_POOL", "4")]).await;
    range.ledger.send_to(&[&app.http]);
    let load = range.ledger.load(&Load::default());
    range.ledger.serves_again(Duration::from_secs(10)).await;
    for table in sized(
        &["outbox_events", "outbox_meta"][..],
        &["outbox_lanes", "outbox_events", "outbox_unrouted", "outbox_meta", "outbox_delivered", "orders"],
    ) {
        let locking = range.witness.writer().begin().await.unwrap();
        locking.execute_unprepared(&format!("lock table {table} in access exclusive mode")).await.unwrap();
        tokio::time::sleep(Duration::from_secs(5)).await;
        locking.rollback().await.unwrap();
        println!("{table}: back after {:?}", range.ledger.serves_again(Duration::from_secs(10)).await);
    }
    range.ledger.stop(load).await;
    assert!(app.is_running());
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
}

/// Requests that keep every connection of their pool hold up other requests, and no delivery.
#[tokio::test]
async fn a_pool_that_is_used_up_is_a_503_and_holds_up_no_delivery() {
    let range = Range::new().await;
    let mut app = range.start("all", &[("DB_POOL", "4")]).await;
    let url = format!("{}/op", app.http);
    let key = |n: usize| format!("k{n}");
    assert_eq!(post(&url, &op_body("before", "k", 1, "delay:2000")).await, StatusCode::CREATED);
    range.ledger.note("before", 1, Answer::Ok);
    let mut holding = JoinSet::new();
    for n in 0..4 {
        let (url, ledger, op) = (url.clone(), range.ledger.clone(), format!("holding-{n}"));
        holding.spawn(async move {
            let answer = post(&url, &op_body(&op, &key(n), 1, "sleep_after:7000")).await;
            ledger.note(&op, 1, if answer.is_success() { Answer::Ok } else { Answer::No });
        });
    }
    let idle =
        "select pid::text from pg_stat_activity where datname = current_database() and state = 'idle in transaction'";
    eventually(Duration::from_secs(5), "all connections are taken", || async { range.texts(idle).await.len() == 4 })
        .await;
    let mut refused = JoinSet::new();
    for n in 0..20 {
        let (url, ledger, op) = (url.clone(), range.ledger.clone(), format!("refused-{n}"));
        refused.spawn(async move {
            let answer = Client::new().post(&url).json(&op_body(&op, &key(n), 1, "ok")).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(answer.headers()["outbox-outcome"], "rolled-back");
            assert!(answer.headers().contains_key("retry-after"));
            ledger.note(&op, 1, Answer::No);
        });
    }
    // Its time has come while no request gets a connection.
    eventually(Duration::from_secs(6), "the delivery of before", || async { !range.sink.first_arrivals().is_empty() })
        .await;
    assert_eq!(range.texts(idle).await.len(), 4, "the pool was not used up any more");
    refused.join_all().await;
    holding.join_all().await;
    assert_eq!(post(&url, &op_body("after", "k", 1, "ok")).await, StatusCode::CREATED);
    range.ledger.note("after", 1, Answer::Ok);
    assert!(app.is_running());
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
}

#[tokio::test]
async fn sessions_that_are_ended_at_random_lose_nothing() {
    let range = Range::new().await;
    let mut app = range.start("all", &[&[("DB_POOL", "4")], QUICK].concat()).await;
    range.ledger.send_to(&[&app.http]);
    let load = range.ledger.load(&Load { sleeps: 0..10, ..Load::default() });
    range.ledger.serves_again(Duration::from_secs(10)).await;
    let ended = Instant::now() + sized(Duration::from_secs(4), Duration::from_secs(30));
    while Instant::now() < ended {
        range
            .execute(
                "select pg_terminate_backend(pid) from pg_stat_activity
                  where datname = current_database() and application_name <> 'witness' order by random() limit 1",
            )
            .await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(20..150))).await;
    }
    println!("back after {:?}", range.ledger.serves_again(Duration::from_secs(10)).await);
    range.ledger.stop(load).await;
    assert!(app.is_running());
    range.assert_clean().await;
    range.assert_nothing_was_given_up().await;
}

/// The oldest transaction of the cluster decides what can be seen as over. Nothing here waits for that.
#[tokio::test]
async fn long_transactions_and_a_foreign_one_held_open_lose_and_delay_nothing() {
    let range = Range::new().await;
    let elsewhere = Database::postgres().open().await;
    let foreign = elsewhere.writer().begin().await.unwrap();
    foreign.execute_unprepared("create table held (); select pg_current_xact_id()").await.unwrap();
    let here = range.witness.writer().begin().await.unwrap();
    here.execute_unprepared("select pg_current_xact_id()").await.unwrap();

    let app = range.start("all", &[("DB_POOL", "20")]).await;
    range.ledger.send_to(&[&app.http]);
    let sleeps = sized(0..300, 0..3000);
    let load = range.ledger.load(&Load { clients: 16, keys: 12, sleeps, rolled_back: 5 });
    tokio::time::sleep(sized(Duration::from_secs(5), Duration::from_secs(60))).await;
    range.ledger.stop(load).await;
    // All of it arrives while they are still open.
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
    assert!(range.ledger.count(Answer::Ok) > 50 && range.ledger.count(Answer::No) > 10);
    here.rollback().await.unwrap();
    foreign.rollback().await.unwrap();
}

#[tokio::test]
async fn promise_1_atomic_an_api_that_is_killed_every_second_leaves_no_partial_op() {
    let range = Range::new().await;
    let _worker = range.start("worker", &[]).await;
    let load = range.ledger.load(&Load { clients: 8, sleeps: 0..20, ..Load::default() });
    let (mut kills, started) = (0, Instant::now());
    // How much that is in a second depends on the machine.
    let enough =
        |kills| kills >= sized(6, 60) && range.ledger.count(Answer::Ok) > 50 && range.ledger.count(Answer::Unknown) > 0;
    while !enough(kills) {
        assert!(started.elapsed() < sized(Duration::from_secs(90), Duration::from_secs(600)), "{kills} kills");
        let api = range.start("serve", &[]).await;
        range.ledger.send_to(&[&api.http]);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(300..900))).await;
        api.kill().await;
        range.ledger.send_to(&[]);
        kills += 1;
    }
    range.ledger.stop(load).await;
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
}

/// Few sessions behind a pooler, and each transaction gets any of them. Notifications do not get through.
#[tokio::test]
async fn api_and_worker_behind_a_transaction_pooler_lose_nothing_and_say_once_that_they_poll() {
    let range = Range::new().await;
    let pooler = PgBouncer::start(Postgres::shared(), 3);
    let url = format!("{}?statement-cache-capacity=0", pooler.url(&range.url));
    let logs = tempfile::tempdir().unwrap();
    let settings = [
        ("DATABASE_URL", url.as_str()),
        ("SINK_URL", &range.sink_url),
        ("WEBHOOK_SECRET", SECRET),
        ("OUTBOX_POLL_MS", "100"),
        ("RUST_LOG", "info"),
    ];
    let mut processes = Vec::new();
    for (name, mode) in [("api-1", "serve"), ("api-2", "serve"), ("worker-1", "worker"), ("worker-2", "worker")] {
        processes.push(Process::start_with_log("conformance-app", mode, &settings, &logs.path().join(name)).await);
    }
    range.ledger.send_to(&[&processes[0].http, &processes[1].http]);
    let load = range.ledger.load(&Load { sleeps: 0..5, rolled_back: 10, ..Load::default() });
    tokio::time::sleep(sized(Duration::from_secs(4), Duration::from_secs(60))).await;
    range.ledger.stop(load).await;
    range.assert_clean().await;
    range.assert_no_attempt_was_burnt().await;
    assert!(range.ledger.count(Answer::Ok) > 20 && range.ledger.count(Answer::Unknown) == 0);
    for name in ["worker-1", "worker-2"] {
        let log = std::fs::read_to_string(logs.path().join(name)).unwrap();
        assert_eq!(log.matches("found by polling").count(), 1, "{log}");
        assert!(!log.contains("prepared statement"), "{log}");
    }
}

/// Tables with their columns, indexes and constraints.
const SCHEMA: &str = "
    select table_name || '.' || column_name || ' ' || data_type || ' ' || is_nullable from information_schema.columns
     where table_schema = 'public'
    union all select indexdef from pg_indexes where schemaname = 'public'
    union all select conname || ' ' || pg_get_constraintdef(oid) from pg_constraint
               where connamespace = 'public'::regnamespace
    union all select 'applied ' || version from seaql_migrations
    union all select 'schema ' || schema_version from outbox_meta";

fn migrate(url: &str) -> tokio::process::Command {
    let mut migrate = command("conformance-app", "migrate", &[("DATABASE_URL", url)]);
    migrate.stdout(Stdio::null()).stderr(Stdio::piped());
    migrate
}

#[tokio::test]
async fn eight_processes_that_migrate_at_once_and_kills_in_the_middle_end_in_one_schema() {
    let reference = Database::postgres();
    assert!(migrate(&reference.url()).status().await.unwrap().success());
    let schema = texts(&reference.open().await, SCHEMA).await;
    assert!(schema.len() > 80, "{schema:?}");

    for _ in 0..sized(3, 10) {
        let database = Database::postgres();
        let mut running = JoinSet::new();
        for _ in 0..8 {
            running.spawn(migrate(&database.url()).output());
        }
        for output in running.join_all().await {
            let output = output.unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        assert_eq!(texts(&database.open().await, SCHEMA).await, schema);
    }

    // As long as a whole migration takes, so that the kills hit all of it. A migration that was
    // faster this time is tried again, killed sooner.
    let started = Instant::now();
    assert!(migrate(&Database::postgres().url()).status().await.unwrap().success());
    let whole = started.elapsed();
    let kills = sized(10, 30);
    for n in 0..kills {
        let mut after = whole * n / kills;
        let database = loop {
            let database = Database::postgres();
            let mut process = migrate(&database.url()).spawn().unwrap();
            tokio::time::sleep(after).await;
            if process.try_wait().unwrap().is_none() {
                process.kill().await.unwrap();
                break database;
            }
            after /= 2;
        };
        let output = migrate(&database.url()).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(texts(&database.open().await, SCHEMA).await, schema);
    }
}

/// The member `raw` of the payload, as it came.
#[derive(serde::Deserialize)]
struct CloudEvent {
    data: Data,
}

#[derive(serde::Deserialize)]
struct Data {
    op: String,
    #[serde(default)]
    raw: Option<Box<RawValue>>,
    #[serde(default)]
    text: Option<String>,
}

#[tokio::test]
async fn odd_json_is_delivered_equal_or_refused_as_the_clients_fault() {
    let range = Range::new().await;
    let app = range.start("all", &[]).await;
    let url = format!("{}/op", app.http);
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    let objects = |depth: usize| "{\"a\":".repeat(depth) + "1" + &"}".repeat(depth);
    let mut sent = Vec::new();
    for arg in [
        r#""\u0000""#.to_owned(),
        r#"{"\u0000": "a\u0000b", "": [""]}"#.to_owned(),
        "9007199254740993".to_owned(),
        "-9223372036854775809".to_owned(),
        "123456789012345678901234567890.5".to_owned(),
        "-0.0".to_owned(),
        "1e400".to_owned(),
        r#"{"a": 1, "a": 2, "b": {"a": 1, "a": 1}}"#.to_owned(),
        r#""\ud800""#.to_owned(),
        r#""\udc00\ud800""#.to_owned(),
        r#""\ud83e\udd80 🦀 \u2028 \uffff \ufeff""#.to_owned(),
        "\"\u{7f}\u{80}\u{ffff}\u{10ffff}\"".to_owned(),
        " [ 1 ,\t2\n] ".to_owned(),
        "{\"a\":1,}".to_owned(),
        "nul".to_owned(),
        "\"a\u{0}b\"".to_owned(),
        "\"a\nb\"".to_owned(),
        nested(100),
        objects(100),
        nested(1000),
        objects(1000),
        nested(10_000),
        objects(10_000),
    ] {
        let op = format!("{}", sent.len());
        let body = json!({ "op": &op, "key": &op, "n": 0, "mode": "raw", "arg": &arg });
        let status = post(&url, &body).await;
        assert!(
            [
                StatusCode::CREATED,
                StatusCode::BAD_REQUEST,
                StatusCode::PAYLOAD_TOO_LARGE,
                StatusCode::UNPROCESSABLE_ENTITY
            ]
            .contains(&status),
            "{status} for {arg:.80}"
        );
        sent.push((op, arg, status.is_success()));
    }
    let accepted: Vec<_> = sent.iter().filter(|(_, _, accepted)| *accepted).collect();
    assert!(accepted.len() >= 11, "{} were accepted", accepted.len());
    eventually(Duration::from_secs(20), "all arrive", || async { range.sink.arrivals().len() >= accepted.len() }).await;
    let arrivals = range.sink.arrivals();
    assert_eq!(arrivals.len(), accepted.len());
    for arrival in arrivals {
        let CloudEvent { data } = serde_json::from_slice(&arrival.body).unwrap();
        let (_, arg, accepted) = sent.iter().find(|(op, _, _)| *op == data.op).unwrap();
        // Equal to the last digit, and with every one of its members.
        assert_eq!(data.raw.unwrap().get(), arg.trim());
        assert!(accepted);
    }
    range.assert_nothing_was_given_up().await;
}

#[tokio::test]
async fn a_payload_at_the_limit_is_delivered_and_one_byte_more_is_refused() {
    let range = Range::new().await;
    let app = range.start("all", &[]).await;
    let url = format!("{}/op", app.http);
    let empty = json!({ "op": "0", "i": 0, "key": "k", "seq": null, "text": "" }).to_string().len();
    let most = 1024 * 1024 - empty;
    for (op, bytes, expected) in [("0", most - 1, 201), ("1", most, 201), ("2", most + 1, 413), ("3", 4 * most, 413)] {
        assert_eq!(post(&url, &op_body(op, "k", 0, &format!("big:{bytes}"))).await, expected, "{bytes}");
    }
    eventually(Duration::from_secs(20), "both arrive", || async { range.sink.arrivals().len() == 2 }).await;
    let lengths: Vec<usize> = range
        .sink
        .arrivals()
        .iter()
        .map(|arrival| serde_json::from_slice::<CloudEvent>(&arrival.body).unwrap().data.text.unwrap().len())
        .collect();
    assert_eq!(lengths, [most - 1, most]);
    assert_eq!(range.texts("select op from orders").await, ["0", "1"]);
}

/// Passwords, signing secrets and what stands in a destination's URL are in no log, no error and no answer to operators,
/// and operators are asked for their token everywhere.
#[tokio::test]
async fn promise_10_quiet_and_closed_no_secret_is_told_and_nothing_opens_without_the_token() {
    let range = Range::new().await;
    let database = range.url.replacen("postgres@", "postgres:aDatabasePassword@", 1);
    assert_ne!(database, range.url);
    // Nobody listens there: the URL is in the error of every attempt, as far as it may be.
    let sink_url = "http://127.0.0.1:1/aSecretPath?key=aSecretQuery";
    let settings = [
        ("DATABASE_URL", database.as_str()),
        ("SINK_URL", sink_url),
        ("WEBHOOK_SECRET", SECRET),
        ("OUTBOX_POLL_MS", "50"),
        ("RUST_LOG", "debug,hyper_util=info"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let app = Process::start_with_log("conformance-app", "all", &settings, &log).await;
    assert_eq!(post(&format!("{}/op", app.http), &op_body("op", "k", 1, "ok")).await, StatusCode::CREATED);
    let poison = json!({ "op": "poison", "key": "k", "kind": "permanent" });
    assert_eq!(post(&format!("{}/poison", app.http), &poison).await, StatusCode::CREATED);
    let (down, dead) = (
        "select last_error from outbox_lanes where last_error like '%127.0.0.1:1%'",
        "select error from outbox_dead_letters",
    );
    eventually(Duration::from_secs(10), "the sink is down and the poison dead", || async {
        range.texts(down).await.len() == 1 && range.texts(dead).await.len() == 1
    })
    .await;
    // A broken statement of a request: the database says much, the client hears little.
    let refused =
        Client::new().post(format!("{}/op", app.http)).json(&op_body("op", "k", 1, "ok")).send().await.unwrap();
    assert_eq!(refused.status(), StatusCode::CONFLICT);
    let mut told = refused.text().await.unwrap();
    assert!(!told.contains("duplicate key"), "{told}");

    let paths = ["/", "/metrics", "/outbox", "/outbox/api/status", "/outbox/api/events", "/outbox/api/dead-letters"];
    for path in paths {
        let url = format!("{}{path}", app.ops);
        for request in [Client::new().get(&url), Client::new().get(&url).bearer_auth("wrong"), Client::new().post(&url)]
        {
            assert_eq!(request.send().await.unwrap().status(), StatusCode::UNAUTHORIZED, "{path}");
        }
        let answer = Client::new().get(&url).bearer_auth(TOKEN).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        told += &answer.text().await.unwrap();
    }
    told += &range.texts(down).await.concat();
    told += &std::fs::read_to_string(&log).unwrap();
    assert!(told.contains("127.0.0.1:1"), "the sink is not spoken of");
    for secret in ["aDatabasePassword", "aSecretPath", "aSecretQuery", SECRET.trim_start_matches("whsec_"), TOKEN] {
        let at = told.find(secret);
        assert!(at.is_none(), "{secret}: {}", &told[at.unwrap().saturating_sub(200)..at.unwrap() + 40]);
    }
}
