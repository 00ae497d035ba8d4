//! The application as a process, and what its worker delivers.

use std::{
    collections::HashMap,
    process::Stdio,
    time::{Duration, Instant},
};

use outbox_seaorm::{Outbox, entity::events};
use outbox_tests::{
    Database, Process, TOKEN, command, eventually,
    sink::{SECRET, Sink},
    texts,
};
use reqwest::{Client, StatusCode};
use sea_orm::{ConnectionTrait, EntityTrait, Statement};
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// A database of its own, a sink, and the settings of a process that uses both.
struct Place {
    database: Database,
    sink: Sink,
    settings: Vec<(String, String)>,
}

impl Place {
    async fn on(database: Database, settings: &[(&str, &str)]) -> Self {
        let (url, sink) = (database.url(), Sink::default());
        let own = [("DATABASE_URL", url.as_str()), ("SINK_URL", &sink.start().await), ("WEBHOOK_SECRET", SECRET)];
        let settings = own.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Self { settings: settings.collect(), database, sink }
    }

    fn settings(&self) -> Vec<(&str, &str)> {
        self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    async fn start(&self, mode: &str) -> Process {
        Process::start("conformance-app", mode, &self.settings()).await
    }
}

async fn post(client: &Client, url: &str, body: &Value) -> StatusCode {
    client.post(url).json(body).send().await.unwrap().status()
}

async fn get(url: &str) -> Value {
    Client::new().get(url).bearer_auth(TOKEN).send().await.unwrap().json().await.unwrap()
}

/// Each subscription's `pending`, `leased` and `dead`.
async fn counts(process: &Process) -> HashMap<String, [i64; 3]> {
    let status = get(&format!("{}/outbox/api/status", process.ops)).await;
    let each = status["subscriptions"].as_array().unwrap().iter().map(|subscription| {
        let count = |name: &str| subscription[name].as_i64().unwrap();
        (subscription["name"].as_str().unwrap().to_owned(), [count("pending"), count("leased"), count("dead")])
    });
    each.collect()
}

async fn drained(process: &Process, limit: Duration) -> HashMap<String, i64> {
    eventually(limit, "nothing is pending and nothing is leased", || async {
        counts(process).await.values().all(|[pending, leased, _]| *pending == 0 && *leased == 0)
    })
    .await;
    counts(process).await.into_iter().map(|(name, [_, _, dead])| (name, dead)).collect()
}

#[tokio::test]
async fn every_committed_event_arrives_in_order_and_has_its_effect_once() {
    for database in [Database::sqlite(), Database::postgres()] {
        let place = Place::on(database, &[]).await;
        let process = place.start("all").await;
        let mut clients = JoinSet::new();
        for client in 0..4 {
            let url = format!("{}/op", process.http);
            clients.spawn(async move {
                let http = Client::new();
                for op in 0..50 {
                    let (key, n) = (format!("k{}", fastrand::u8(0..20)), fastrand::u8(1..4));
                    let op = json!({ "op": format!("{client}-{op}"), "key": key, "n": n, "mode": "ok", "arg": "" });
                    assert_eq!(post(&http, &url, &op).await, StatusCode::CREATED);
                }
            });
        }
        while let Some(client) = clients.join_next().await {
            client.unwrap();
        }
        let dead = drained(&process, Duration::from_secs(30)).await;
        assert_eq!(dead, HashMap::from(["sink", "effects", "poison"].map(|name| (name.to_owned(), 0))));
        assert_eq!(get(&format!("{}/orders", process.http)).await.as_array().unwrap().len(), 200);

        let witness = place.database.open().await;
        let events = events::Entity::find().all(witness.reader()).await.unwrap();
        let mut stored: Vec<String> = events.iter().map(|event| event.event_id.to_string()).collect();
        let mut arrived: Vec<String> =
            place.sink.first_arrivals().iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect();
        stored.sort_unstable();
        arrived.sort_unstable();
        assert_eq!(arrived, stored);
        for (key, numbers) in place.sink.numbers() {
            assert!(numbers.iter().copied().eq(1..=i64::try_from(numbers.len()).unwrap()), "{key}: {numbers:?}");
        }
        assert_eq!(effects(&witness).await, (i64::try_from(stored.len()).unwrap(), 1));

        let (status, _) = process.terminate(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(0));
    }
}

/// How many events had their effect, and how often at most.
async fn effects(witness: &Outbox) -> (i64, i64) {
    let sql = "select count(*) as events, coalesce(max(applied), 0) as most from effects where applied > 0";
    let statement = Statement::from_string(witness.reader().get_database_backend(), sql);
    let row = witness.reader().query_one_raw(statement).await.unwrap().unwrap();
    (row.try_get("", "events").unwrap(), row.try_get("", "most").unwrap())
}

#[tokio::test]
async fn what_is_delivered_is_a_cloud_event_with_the_payload_as_it_was_and_not_before_its_time() {
    for database in [Database::sqlite(), Database::postgres()] {
        let place = Place::on(database, &[]).await;
        let process = place.start("all").await;
        let (client, url, started) = (Client::new(), format!("{}/op", process.http), Instant::now());
        let delayed = json!({ "op": "delayed", "key": "k1", "n": 1, "mode": "delay:700", "arg": "" });
        let raw = json!({ "op": "raw", "key": "k2", "n": 0, "mode": "raw", "arg": "{\"a\": [1e300, \"é\\u0000\"]}" });
        assert_eq!(post(&client, &url, &delayed).await, StatusCode::CREATED);
        assert_eq!(post(&client, &url, &raw).await, StatusCode::CREATED);
        eventually(Duration::from_secs(10), "both arrive", || async { place.sink.first_arrivals().len() == 2 }).await;
        assert!(started.elapsed() >= Duration::from_millis(700), "{:?}", started.elapsed());
        let arrivals = place.sink.first_arrivals();
        let event = &arrivals[0];
        assert_eq!(
            (&event["specversion"], &event["type"], &event["subject"]),
            (&json!("1.0"), &json!("order.placed"), &json!("k2"))
        );
        let data = json!({ "op": "raw", "i": 0, "key": "k2", "seq": null, "raw": { "a": [1e300, "é\u{0}"] } });
        assert_eq!(event["data"], data);
        assert_eq!(arrivals[1]["data"], json!({ "op": "delayed", "i": 0, "key": "k1", "seq": 1 }));
    }
}

#[tokio::test]
async fn poison_becomes_a_dead_letter_and_delays_nobody_else() {
    for database in [Database::sqlite(), Database::postgres()] {
        let place = Place::on(
            database,
            &[
                ("OUTBOX_LEASE_MS", "500"),
                ("OUTBOX_MAX_ATTEMPTS", "2"),
                ("OUTBOX_BACKOFF_BASE_MS", "50"),
                ("OUTBOX_BACKOFF_MAX_MS", "100"),
            ],
        )
        .await;
        let process = place.start("all").await;
        let (client, poison, op) = (Client::new(), format!("{}/poison", process.http), format!("{}/op", process.http));
        for kind in ["error", "panic", "permanent", "hang", "block"] {
            let body = json!({ "op": kind, "key": kind, "kind": kind });
            assert_eq!(post(&client, &poison, &body).await, StatusCode::CREATED);
            let body = json!({ "op": format!("beside {kind}"), "key": kind, "n": 1, "mode": "ok", "arg": "" });
            assert_eq!(post(&client, &op, &body).await, StatusCode::CREATED);
        }
        let dead = drained(&process, Duration::from_secs(30)).await;
        assert_eq!((dead["sink"], dead["effects"], dead["poison"]), (0, 0, 5));
        assert_eq!(place.sink.first_arrivals().len(), 5);
        assert_eq!(effects(&place.database.open().await).await, (5, 1));
    }
}

#[tokio::test]
async fn an_event_that_ends_its_process_every_time_becomes_a_dead_letter() {
    for database in [Database::sqlite(), Database::postgres()] {
        let place = Place::on(database, &[("OUTBOX_LEASE_MS", "300"), ("OUTBOX_MAX_ATTEMPTS", "2")]).await;
        let serving = place.start("serve").await;
        let body = json!({ "op": "abort", "key": "k", "kind": "abort" });
        assert_eq!(post(&Client::new(), &format!("{}/poison", serving.http), &body).await, StatusCode::CREATED);
        let witness = place.database.open().await;
        let is_dead = || async {
            let status = witness.status().await.unwrap();
            status.subscriptions.iter().any(|each| each.name == "poison" && each.dead == 1 && each.pending == 0)
        };
        let mut ended = 0;
        while !is_dead().await {
            let mut command = command("conformance-app", "worker", &place.settings());
            let mut worker = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            tokio::select! {
                _ = worker.wait() => ended += 1,
                () = eventually(Duration::from_secs(30), "it ends, or the event is dead", is_dead) => {}
            }
            assert!(ended <= 2, "each attempt counts");
        }
        assert_eq!(ended, 2);
    }
}

/// A few hundred events that harm nobody, and in the middle of them one that ends its process every time.
#[tokio::test]
async fn of_all_that_was_leased_when_a_process_ended_only_the_event_that_ended_it_dies() {
    for database in [Database::sqlite(), Database::postgres()] {
        let settings = [("OUTBOX_LEASE_MS", "1000"), ("OUTBOX_POLL_MS", "50"), ("OUTBOX_MAX_ATTEMPTS", "1")];
        let place = Place::on(database, &settings).await;
        let serving = place.start("serve").await;
        let (client, url) = (Client::new(), format!("{}/poison", serving.http));
        for n in 0..300 {
            let kind = if n == 150 { "abort" } else { "none" };
            let body = json!({ "op": n.to_string(), "key": n.to_string(), "kind": kind });
            assert_eq!(post(&client, &url, &body).await, StatusCode::CREATED);
        }
        let mut worker = place.start("worker").await;
        let witness = place.database.open().await;
        let is_over = || async {
            let status = witness.status().await.unwrap();
            status.subscriptions.iter().any(|each| each.name == "poison" && each.dead > 0 && each.pending == 0)
        };
        let (mut ended, started) = (0, Instant::now());
        while !is_over().await {
            assert!(started.elapsed() < Duration::from_secs(60), "the process ended {ended} times");
            if !worker.is_running() {
                ended += 1;
                worker = place.start("worker").await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let dead = "select e.aggregate_id || ': ' || x.error from outbox_dead_letters x
                      join outbox_events e on e.position = x.position";
        let dead = texts(&witness, dead).await;
        assert!(
            dead.len() == 1 && dead[0].starts_with("150: ") && dead[0].contains("ended without a result"),
            "{dead:?}"
        );
        let delivered = "select cast(count(distinct position) as text) from outbox_delivered";
        assert_eq!(texts(&witness, delivered).await, ["299"]);
        // With others, in a group, and alone.
        assert!((2..=3).contains(&ended), "the process ended {ended} times");
    }
}

#[tokio::test]
async fn each_part_runs_alone_and_says_where() {
    for database in [Database::sqlite(), Database::postgres()] {
        let place = Place::on(database, &[("OUTBOX_POLL_MS", "50")]).await;
        let output = command("conformance-app", "migrate", &place.settings()).output().await.unwrap();
        assert!(output.status.success());
        let (serving, working) = (place.start("serve").await, place.start("worker").await);
        assert_eq!((serving.ops.as_str(), working.http.as_str()), ("http://-", "http://-"));
        let op = json!({ "op": "a", "key": "k", "n": 3, "mode": "ok", "arg": "" });
        assert_eq!(post(&Client::new(), &format!("{}/op", serving.http), &op).await, StatusCode::CREATED);
        eventually(Duration::from_secs(10), "all arrive", || async { place.sink.first_arrivals().len() == 3 }).await;
        for process in [serving, working] {
            assert_eq!(process.terminate(Duration::from_secs(10)).await.0.code(), Some(0));
        }
    }
}

#[tokio::test]
async fn a_setting_that_cannot_be_followed_is_refused_with_a_sentence() {
    for (name, value, sentence) in [
        ("OUTBOX_DEAD_LETTER_POLICY", "stop", "must be hold or continue"),
        ("SINK_ORDERING", "none", "must be key or global"),
        ("MORE_SINK_URLS", "here", "webhook URL"),
        ("OUTBOX_RETENTION_MS", "a week", "OUTBOX_RETENTION_MS"),
        ("OUTBOX_LEASE_MS", "0", "OUTBOX_LEASE_MS"),
        ("DB_POOL", "0", "DB_POOL"),
        ("REDIS_URL", "localhost", "redis://"),
        ("WEBHOOK_SECRET", "", "WEBHOOK_SECRET"),
        ("WEBHOOK_SECRET", "whsec_c2hvcnQ=", "webhook secret"),
        ("DATABASE_URL", "mysql://localhost/x", "sqlite://"),
    ] {
        let place = Place::on(Database::sqlite(), &[(name, value)]).await;
        let run = command("conformance-app", "all", &place.settings()).output();
        let output = tokio::time::timeout(Duration::from_secs(20), run).await.expect("it ends").unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && text.contains(sentence), "{name}={value}: {text}");
    }
}
