//! The operators' API: what it answers, what it changes, and what it refuses.

use axum::{Router, body::Body};
use http::{Method, Request};
use outbox_axum::Operator;
use outbox_core::{AttemptLog, Context, NewEvent, Subscription};
use outbox_migrations::sea_orm_migration::{MigrationTrait, MigratorTrait};
use outbox_seaorm::{Finished, LaneReport, Next, Outbox};
use outbox_test_servers::Postgres;
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};

use crate::support::{Answer, Store, placed, send};

const TOKEN: &str = "correct-horse-battery";

struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        outbox_migrations::all()
    }
}

struct Api {
    outbox: Outbox,
    router: Router,
    _store: Option<Store>,
}

impl Api {
    async fn new() -> Self {
        let store = Store::new().await;
        Self::over(store.outbox.clone(), Some(store)).await
    }

    async fn on_postgres() -> Self {
        let outbox = Outbox::connect(&Postgres::shared().database(), 2).await.unwrap();
        outbox_migrations::up::<Migrator>(outbox.writer()).await.unwrap();
        Self::over(outbox, None).await
    }

    /// The subscription `mail` with two dead letters, and `audit`, which began later.
    async fn over(outbox: Outbox, store: Option<Store>) -> Self {
        let router = Operator::new(outbox.clone(), TOKEN).unwrap().into_router();
        for name in ["mail", "audit"] {
            let id = outbox.register(&Subscription::new(name).unwrap()).await.unwrap();
            if name == "mail" {
                let unit = outbox.begin(Context::default());
                unit.events().push(placed("a")).unwrap();
                unit.events()
                    .push(NewEvent::dynamic("order.shipped", "order", "b", &json!({"n": 1})).unwrap())
                    .unwrap();
                unit.commit().await.unwrap();
            }
            outbox.route_waiting().await.unwrap();
            for lane in outbox.claim(id, "w", 10, 10, std::time::Duration::from_secs(60)).await.unwrap().lanes {
                let position = lane.run[0].position;
                let error = Some("no such address".to_owned());
                let finished = vec![Finished { position, attempts: 1, log: AttemptLog::default(), error }];
                outbox.settle(&[LaneReport { lane: lane.lane, finished, next: Next::Yield }]).await.unwrap();
            }
        }
        Self { outbox, router, _store: store }
    }

    async fn send(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Answer {
        let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {TOKEN}"));
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        send(&self.router, request.body(body.into()).unwrap()).await
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        json_of(self.send(Method::GET, path, &[], "").await)
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let json = [("content-type", "application/json")];
        json_of(self.send(Method::POST, path, &json, body.to_string()).await)
    }

    async fn dead(&self) -> Vec<Value> {
        self.get("/outbox/api/dead-letters").await.1["items"].as_array().unwrap().clone()
    }
}

fn json_of(answer: Answer) -> (u16, Value) {
    (answer.status.as_u16(), serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{}", answer.body)))
}

fn error_of((status, body): (u16, Value)) -> (u16, String) {
    (status, body["error"].as_str().unwrap_or_else(|| panic!("{body}")).to_owned())
}

#[tokio::test]
async fn dead_letters_are_listed_in_pages() {
    let api = Api::new().await;
    let (status, first) = api.get("/outbox/api/dead-letters?subscription=mail&limit=1").await;
    assert_eq!(status, 200);
    let item = &first["items"][0];
    let mut names: Vec<_> = item.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    let expected = [
        "aggregate_id",
        "aggregate_type",
        "attempts",
        "died_at",
        "error",
        "event_id",
        "event_type",
        "id",
        "subscription",
    ];
    assert_eq!(names, expected);
    assert!(item["id"].is_string() && item["event_id"].is_string() && item["attempts"] == 1, "{item}");
    let next = first["next"].as_str().unwrap();
    let second = api.get(&format!("/outbox/api/dead-letters?subscription=mail&limit=1&cursor={next}")).await.1;
    assert!(second["items"][0]["id"] != item["id"] && second["next"].is_null(), "{second}");
    assert_eq!(api.dead().await.len(), 2);
    let shipped =
        api.get("/outbox/api/dead-letters?event_type=order.shipped&until=2999-01-01T00:00:00%2B02:00").await.1;
    assert_eq!(shipped["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn dead_letters_are_replayed_and_discarded_by_id_and_by_filter() {
    let api = Api::new().await;
    let id = api.dead().await[0]["id"].clone();
    let by_id = |dry_run: bool| json!({"ids": [id], "dry_run": dry_run, "reason": "tested"});
    let replay = "/outbox/api/dead-letters/replay";
    assert_eq!(api.post(replay, by_id(true)).await, (200, json!({"matched": 1, "changed": 0})));
    assert_eq!(api.post(replay, by_id(false)).await, (200, json!({"matched": 1, "changed": 1})));
    assert_eq!(api.post(replay, by_id(false)).await, (200, json!({"matched": 0, "changed": 0})));
    let discard = "/outbox/api/dead-letters/discard";
    let of_mail = json!({"filter": {"subscription": "mail"}});
    assert_eq!(api.post(discard, of_mail).await, (200, json!({"matched": 1, "changed": 1})));
    assert_eq!(api.post(discard, json!({"filter": {}})).await, (200, json!({"matched": 0, "changed": 0})));
    assert!(api.dead().await.is_empty());
    let audit = api.get("/outbox/api/audit").await.1;
    let [_, discarded, _, replayed] = &audit["items"].as_array().unwrap()[..] else { panic!("{audit}") };
    assert_eq!((&discarded["action"], &discarded["actor"]), (&json!("discard"), &json!("operator")));
    assert_eq!(
        (&replayed["details"]["reason"], &replayed["details"]["ids"]),
        (&json!("tested"), &json!([id.as_str().unwrap().parse::<i64>().unwrap()]))
    );
}

#[tokio::test]
async fn a_subscription_is_paused_resumed_and_replayed() {
    let api = Api::new().await;
    let of = |action: &str| format!("/outbox/api/subscriptions/mail/{action}");
    assert_eq!(api.post(&of("pause"), json!({})).await, (200, json!({"changed": 1})));
    assert_eq!(api.post(&of("pause"), json!({})).await, (200, json!({"changed": 0})));
    assert_eq!(api.get("/outbox/api/status").await.1["subscriptions"][1]["paused"], json!(true));
    let json = [("content-type", "application/json; charset=utf-8"), ("authorization", "ignored")];
    assert_eq!(json_of(api.send(Method::POST, &of("resume"), &json[..1], "").await), (200, json!({"changed": 1})));
    let event = api.dead().await[0]["event_id"].clone();
    for selected in [
        json!({"event_type": "order.shipped"}),
        json!({"event_ids": [event]}),
        json!({"since": "2020-01-01T00:00:00Z"}),
    ] {
        let mut dry = selected.clone();
        dry["dry_run"] = json!(true);
        let (status, answer) = api.post(&of("replay"), dry).await;
        assert!(
            status == 200 && answer["matched"].as_u64().unwrap() > 0 && answer["changed"] == 0,
            "{selected} {answer}"
        );
    }
    assert_eq!(
        api.post(&of("replay"), json!({"event_type": "order.shipped"})).await,
        (200, json!({"matched": 1, "changed": 1}))
    );
    assert_eq!(
        api.post(&of("replay"), json!({"since": "2020-01-01T00:00:00Z"})).await,
        (200, json!({"matched": 1, "changed": 1}))
    );
}

#[tokio::test]
async fn events_are_listed_and_shown_with_deliveries_and_why() {
    let api = Api::new().await;
    let (_, first) = api.get("/outbox/api/events?aggregate_type=order&limit=1").await;
    let cursor = first["next"].as_str().unwrap();
    let (_, second) = api.get(&format!("/outbox/api/events?limit=1&cursor={cursor}")).await;
    assert!(second["next"].is_null() && first["items"][0]["event_type"] == "order.shipped", "{first} {second}");
    let id = first["items"][0]["id"].as_str().unwrap();
    let (status, event) = api.get(&format!("/outbox/api/events/{id}")).await;
    assert_eq!((status, &event["payload"], &event["id"]), (200, &json!({"n": 1}), &json!(id)));
    assert_eq!(
        event["deliveries"][0],
        json!({
            "subscription": "mail", "state": "dead", "attempts": 1, "due_at": null, "leased_by": null,
            "finished_at": event["deliveries"][0]["finished_at"], "error": "no such address", "attempt_log": [],
        })
    );
    let (status, why) = api.get(&format!("/outbox/api/events/{id}/why")).await;
    assert_eq!((status, why.as_array().unwrap().len()), (200, 2));
    assert_eq!((&why[0]["subscription"], &why[0]["state"]), (&json!("audit"), &json!("none")));
    assert_eq!(
        (&why[1]["subscription"], &why[1]["state"], &why[1]["details"]["cause"]),
        (&json!("mail"), &json!("dead"), &json!("dead"))
    );
    assert!(why[1]["reason"].as_str().unwrap().starts_with("dead letter since") && why[1]["since"].is_string());
}

/// Numbers that no double holds, and a row that somebody broke.
#[tokio::test]
async fn payloads_are_shown_as_they_are() {
    let api = Api::new().await;
    let id = api.get("/outbox/api/events").await.1["items"][0]["id"].as_str().unwrap().to_owned();
    for (stored, shown) in [("12345678901234567890123", "12345678901234567890123"), ("{broken", "\"{broken\"")] {
        api.outbox
            .writer()
            .execute_unprepared(&format!("update outbox_events set payload = '{stored}'"))
            .await
            .unwrap();
        let answer = api.send(Method::GET, &format!("/outbox/api/events/{id}"), &[], "").await;
        assert!(answer.status == 200 && answer.body.contains(&format!("\"payload\":{shown}")), "{}", answer.body);
    }
    api.outbox.writer().execute_unprepared("update outbox_events set recorded_at = 'never'").await.unwrap();
    let (status, event) = api.get(&format!("/outbox/api/events/{id}")).await;
    assert!(status == 200 && event["unreadable"].is_string(), "{event}");
    assert_eq!(api.get(&format!("/outbox/api/events/{id}/why")).await.0, 200);
}

/// What can be read of it is where it always is, and what cannot is `null`.
async fn a_damaged_event_stands_among_the_others(api: Api, damage: &str, unreadable: &str) {
    let whole = api.get("/outbox/api/events").await.1["items"].clone();
    let sql = format!("update outbox_events set tags = '[1]', {damage} where aggregate_id = 'a'");
    api.outbox.writer().execute_unprepared(&sql).await.unwrap();
    let (status, page) = api.get("/outbox/api/events").await;
    let [other, damaged] = page["items"].as_array().unwrap().as_slice() else { panic!("{page}") };
    assert_eq!((status, other), (200, &whole[0]));
    let told = damaged["unreadable"].as_str().unwrap();
    assert!(told.contains("tags: ") && told.contains(unreadable), "{told}");
    let mut expected = whole[1].clone();
    (expected["tags"], expected[unreadable], expected["unreadable"]) = (Value::Null, Value::Null, json!(told));
    assert_eq!(*damaged, expected);

    let (status, details) = api.get(&format!("/outbox/api/events/{}", damaged["id"].as_str().unwrap())).await;
    assert_eq!((status, &details["unreadable"], &details["event_type"]), (200, &json!(told), &whole[1]["event_type"]));
    assert!(details["payload"].is_object() && details["deliveries"].as_array().unwrap().len() == 1, "{details}");
    let (status, dead) = api.get("/outbox/api/dead-letters").await;
    assert_eq!((status, dead["items"].as_array().unwrap().len()), (200, 2));
    assert_eq!(api.get("/outbox/api/status").await.0, 200);
    assert_eq!(api.get("/outbox/api/events?limit=1").await.1["items"], json!([other]));
}

#[tokio::test]
async fn a_damaged_event_stands_among_the_others_on_sqlite() {
    let damage = "recorded_at = 'never'";
    a_damaged_event_stands_among_the_others(Api::new().await, damage, "recorded_at").await;
}

#[tokio::test]
async fn a_damaged_event_stands_among_the_others_on_postgres() {
    let damage = "occurred_at = 'infinity'";
    a_damaged_event_stands_among_the_others(Api::on_postgres().await, damage, "occurred_at").await;
}

#[tokio::test]
async fn a_page_of_another_address_changes_nothing() {
    let api = Api::new().await;
    let body = r#"{"filter":{}}"#;
    let json = ("content-type", "application/json");
    for path in [
        "dead-letters/replay",
        "dead-letters/discard",
        "subscriptions/mail/pause",
        "subscriptions/mail/resume",
        "subscriptions/mail/replay",
    ] {
        let path = format!("/outbox/api/{path}");
        for (headers, status) in [
            (&[("content-type", "application/x-www-form-urlencoded")][..], 415),
            (&[("content-type", "text/plain")], 415),
            (&[("content-type", "multipart/form-data; boundary=x")], 415),
            (&[], 415),
            (&[json, ("sec-fetch-site", "cross-site")], 403),
            (&[json, ("sec-fetch-site", "same-site")], 403),
            (&[json, ("origin", "http://evil.example"), ("host", "ops.example")], 403),
            (&[json, ("origin", "null"), ("host", "ops.example")], 403),
        ] {
            let answer = api.send(Method::POST, &path, headers, body).await;
            assert_eq!(answer.status, status, "{path} {headers:?} {}", answer.body);
        }
        assert_eq!(api.send(Method::GET, &path, &[json], "").await.status, 405);
    }
    assert_eq!(api.dead().await.len(), 2);
    assert_eq!(api.get("/outbox/api/audit").await.1["items"], json!([]));
}

#[tokio::test]
async fn what_is_not_valid_is_named_and_what_is_unknown_is_a_404() {
    let api = Api::new().await;
    for (path, status, named) in [
        ("dead-letters?subscription=Mail", 400, "subscription must have 1 to 64"),
        ("dead-letters?subscription=unknown", 404, "no subscription"),
        ("dead-letters?since=yesterday", 400, "since must be a time"),
        ("dead-letters?until=0000-01-01T00:00:00Z", 400, "until must be a time"),
        ("dead-letters?cursor=abc", 400, "cursor must be"),
        ("dead-letters?limit=0", 400, "limit must be"),
        ("dead-letters?limit=501", 400, "limit must be"),
        ("dead-letters?limit=1&limit=2", 400, "limit is given twice"),
        ("dead-letters?subscripton=mail", 400, "subscripton is not known"),
        ("events?event_type=a%00", 400, "event_type must have"),
        ("events?event_type=Order%20Created", 400, "event_type must have 1 to 128"),
        ("dead-letters?subscription=a/b", 400, "subscription must have 1 to 64"),
        ("events?tenant=%00", 400, "tenant must have"),
        ("events/1", 400, "event_id must be a UUID"),
        ("events/00000000-0000-0000-0000-000000000000", 404, "no event"),
        ("events/00000000-0000-0000-0000-000000000000/why", 404, "no event"),
    ] {
        let (got, error) = error_of(api.get(&format!("/outbox/api/{path}")).await);
        assert!(got == status && error.contains(named), "{path}: {got} {error}");
    }
    let ids = vec!["1"; 10_001];
    for (path, body, status, named) in [
        ("dead-letters/replay", json!({}), 400, "either ids or filter"),
        ("dead-letters/replay", json!({"ids": ["1"], "filter": {}}), 400, "either ids or filter"),
        ("dead-letters/replay", json!({"ids": [1]}), 400, "ids must be a list"),
        ("dead-letters/replay", json!({ "ids": ids }), 400, "ids must be a list"),
        ("dead-letters/discard", json!({"filter": {"subscripton": "x"}}), 400, "filter.subscripton is not known"),
        ("dead-letters/discard", json!({"filter": {"subscription": "x"}}), 404, "no subscription"),
        ("dead-letters/discard", json!({"filter": {"since": 5}}), 400, "filter.since must be text"),
        ("dead-letters/discard", json!({"filter": {}, "dry_run": "no"}), 400, "dry_run must be true or false"),
        ("dead-letters/discard", json!([]), 400, "must be a JSON object"),
        ("subscriptions/unknown/pause", json!({}), 404, "no subscription"),
        ("subscriptions/unknown/replay", json!({"event_ids": []}), 404, "no subscription"),
        ("subscriptions/mail/pause", json!({"x": 1}), 400, "x is not known"),
        ("subscriptions/mail/replay", json!({}), 400, "one of since, event_ids and event_type"),
        ("subscriptions/mail/replay", json!({"event_ids": ["x"]}), 400, "event_ids must be"),
    ] {
        let (got, error) = error_of(api.post(&format!("/outbox/api/{path}"), body.clone()).await);
        assert!(got == status && error.contains(named), "{path} {body}: {got} {error}");
    }
    let json = [("content-type", "application/json")];
    let broken = api.send(Method::POST, "/outbox/api/dead-letters/replay", &json, &b"{\"ids\": \xff}"[..]).await;
    assert_eq!(broken.status, 400);
    let large = api.send(Method::POST, "/outbox/api/dead-letters/replay", &json, vec![b' '; 3 << 20]).await;
    assert_eq!(large.status, 413);
}

/// 200 strings that have broken something somewhere.
fn hostile() -> Vec<String> {
    let mut strings: Vec<String> = [
        "",
        " ",
        "\0",
        "a\0b",
        "'",
        "''",
        "\"",
        "`",
        "\\",
        "%",
        "_",
        ";",
        "--",
        "/*",
        "*/",
        "$1",
        "?",
        ":x",
        "@x",
        "{}",
        "[]",
        "null",
        "true",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
        "-1",
        "0",
        "00",
        "+1",
        "1.0",
        "0x10",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775808",
        "99999999999999999999999999",
        "' or '1'='1",
        "'; drop table outbox_events; --",
        "' union select payload from outbox_events --",
        "1; select pg_sleep(10)",
        "$$",
        "$tag$",
        "E'\\x41'",
        "U&'\\0041'",
        "x'00'",
        "../../etc/passwd",
        "..%2f",
        "%00",
        "%ff",
        "<script>alert(1)</script>",
        "{{7*7}}",
        "${jndi:ldap://x}",
        "\r\nset-cookie: x",
        "\u{feff}",
        "\u{202e}",
        "\u{fffd}",
        "ünïcödé",
        "日本語",
        "👩‍👩‍👧",
        "e\u{301}",
        "İ",
        "ß",
        "ﬀ",
        "\u{10ffff}",
        "infinity",
        "-infinity",
        "now",
        "today",
        "epoch",
        "allballs",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "10000-01-01T00:00:00Z",
        "2026-13-01T00:00:00Z",
        "2026-01-01T24:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-01-01T00:00:60Z",
        "2026-01-01T00:00:00+99:99",
        "+262142-01-01T00:00:00Z",
        "00000000-0000-0000-0000-000000000000",
        "{00000000-0000-0000-0000-000000000000}",
        "urn:uuid:00000000-0000-0000-0000-000000000000",
        "00000000000000000000000000000000",
        "gggggggg-0000-0000-0000-000000000000",
    ]
    .map(str::to_owned)
    .to_vec();
    strings.extend(["a", "'", "%", "é", "9", "(", "\u{1}"].map(|text| text.repeat(5000)));
    strings.extend((1..=31_u8).map(|control| format!("a{}b", char::from(control))));
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    while strings.len() < 200 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let char = |n: u32| char::from_u32((random >> n) as u32 % 0xd800).unwrap_or('x');
        strings.push([char(0), char(9), char(18), char(27)].iter().collect());
    }
    strings
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

async fn hostile_strings_change_nothing(api: Api) {
    let strings = hostile();
    assert_eq!(strings.len(), 200);
    let mut answers = Vec::new();
    for text in &strings {
        let (raw, text) = (text, encoded(text));
        for name in ["subscription", "event_type", "since", "until", "cursor", "limit", "x"] {
            answers.push(api.send(Method::GET, &format!("/outbox/api/dead-letters?{name}={text}"), &[], "").await);
        }
        for name in ["event_type", "aggregate_type", "aggregate_id", "tenant", "actor_kind", "since", "cursor", &text] {
            answers.push(api.send(Method::GET, &format!("/outbox/api/events?{name}={text}"), &[], "").await);
        }
        for path in ["events/@", "events/@/why", "@", "subscriptions/@/pause"] {
            let path = format!("/outbox/api/{}", path.replace('@', &text));
            answers.push(api.send(Method::GET, &path, &[], "").await);
        }
        let json = [("content-type", "application/json")];
        for (path, body) in [
            ("dead-letters/replay", json!({"ids": [raw]})),
            ("dead-letters/replay", json!({"ids": raw})),
            ("dead-letters/replay", json!({"filter": {"subscription": raw}})),
            ("dead-letters/replay", json!({"filter": {"event_type": raw}, "dry_run": true})),
            ("dead-letters/discard", json!({"filter": {"since": raw}, "dry_run": true})),
            ("dead-letters/discard", json!({"filter": {raw: raw}})),
            ("dead-letters/discard", json!({"filter": {}, "dry_run": raw})),
            ("dead-letters/discard", json!({raw: raw})),
            ("dead-letters/discard", json!({"ids": [], "reason": raw})),
            ("subscriptions/mail/replay", json!({"event_ids": [raw]})),
            ("subscriptions/mail/replay", json!({"event_type": raw, "dry_run": true})),
            ("subscriptions/mail/replay", json!({"since": raw, "dry_run": true})),
            ("subscriptions/@/pause", json!({"reason": raw})),
            ("subscriptions/@/resume", json!({})),
            ("subscriptions/@/replay", json!({"event_ids": []})),
        ] {
            let path = format!("/outbox/api/{}", path.replace('@', &text));
            answers.push(api.send(Method::POST, &path, &json, body.to_string()).await);
            answers.push(api.send(Method::POST, &path, &json, raw.clone()).await);
        }
    }
    // Wrong tokens wait for their answers, side by side.
    let wrong = strings.iter().map(|text| {
        let request = Request::get("/outbox/api/status").header("authorization", encoded(text));
        send(&api.router, request.body(Body::empty()).unwrap())
    });
    answers.extend(futures_util::future::join_all(wrong).await);
    for invalid in ["%ff", "%c3%28", "%80", "%"] {
        for path in ["events/@", "events?tenant=@", "dead-letters?subscription=@", "subscriptions/@/pause", "@"] {
            let path = format!("/outbox/api/{}", path.replace('@', invalid));
            answers.push(api.send(Method::GET, &path, &[], "").await);
        }
    }
    for answer in answers {
        assert!(answer.status.as_u16() < 500, "{} {}", answer.status, answer.body);
        let body = answer.body.to_lowercase();
        for telling in ["sql", "syntax", "constraint", "outbox_", "operator does not exist", "panicked"] {
            assert!(!body.contains(telling) || body.contains("is not known here"), "{}", answer.body);
        }
    }
    assert_eq!(api.dead().await.len(), 2);
    let status = api.get("/outbox/api/status").await.1;
    assert!(
        status["subscriptions"].as_array().unwrap().iter().all(|each| each["paused"] == false && each["pending"] == 0)
    );
}

#[tokio::test]
async fn two_hundred_hostile_strings_change_nothing_and_learn_nothing_on_sqlite() {
    hostile_strings_change_nothing(Api::new().await).await;
}

#[tokio::test]
async fn two_hundred_hostile_strings_change_nothing_and_learn_nothing_on_postgresql() {
    hostile_strings_change_nothing(Api::on_postgres().await).await;
}

#[tokio::test]
async fn metrics_are_shown_with_bounded_labels() {
    let api = Api::new().await;
    let unit = api.outbox.begin(Context::default());
    unit.events().push(placed("c")).unwrap();
    unit.commit().await.unwrap();
    let answer = api.send(Method::GET, "/metrics", &[], "").await;
    assert_eq!(
        (answer.status.as_u16(), answer.header("content-type")),
        (200, Some("text/plain; version=0.0.4; charset=utf-8"))
    );
    for line in [
        "outbox_pending_messages{subscription=\"mail\"} 1",
        "outbox_dead_letters{subscription=\"mail\"} 2",
        "outbox_circuit_open{subscription=\"audit\"} 0",
        "outbox_workers{subscription=\"audit\"} 0",
        "outbox_oldest_pending_age_seconds{subscription=\"mail\"} ",
        "# TYPE outbox_oldest_pending_age_seconds gauge",
        "outbox_events_recorded_total{event_type=\"order.placed\",aggregate_type=\"order\"} ",
    ] {
        assert!(answer.body.lines().any(|found| found.starts_with(line)), "{line}\n{}", answer.body);
    }
    let anonymous = send(&api.router, Request::get("/metrics").body(Body::empty()).unwrap()).await;
    assert_eq!(anonymous.status, 401);
}

#[tokio::test]
async fn the_console_loads_nothing_from_elsewhere() {
    let api = Api::new().await;
    for (path, content_type) in [
        ("/outbox", "text/html; charset=utf-8"),
        ("/outbox/", "text/html; charset=utf-8"),
        ("/outbox/console.js", "text/javascript; charset=utf-8"),
        ("/outbox/console.css", "text/css; charset=utf-8"),
    ] {
        let answer = api.send(Method::GET, path, &[], "").await;
        assert_eq!((answer.status.as_u16(), answer.header("content-type")), (200, Some(content_type)), "{path}");
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        assert!(!answer.body.contains("http://") && !answer.body.contains("https://"), "{path}");
        let anonymous = send(&api.router, Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(anonymous.status, 401);
    }
}

#[tokio::test]
async fn alerts_and_dashboard_use_metrics_that_are_there() {
    let api = Api::new().await;
    let gauges = api.send(Method::GET, "/metrics", &[], "").await.body;
    let counters = concat!(
        include_str!("../../../outbox-apalis/src/metrics.rs"),
        include_str!("../../../outbox-seaorm/src/metrics.rs")
    );
    for file in
        [include_str!("../../../docs/monitoring/alerts.yaml"), include_str!("../../../docs/monitoring/dashboard.json")]
    {
        let words = file.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names: Vec<&str> = words.filter(|word| word.starts_with("outbox_")).collect();
        assert!(names.len() > 6, "{names:?}");
        for name in names {
            let name = name.trim_end_matches("_bucket");
            assert!(
                gauges.contains(&format!("# TYPE {name} gauge")) || counters.contains(&format!("\"{name}\"")),
                "{name}"
            );
        }
    }
}

#[tokio::test]
async fn events_are_found_by_names_as_people_have_them() {
    let api = Api::new().await;
    let unit = api.outbox.begin(Context::default());
    unit.events().set_actor(outbox_core::Actor::new("SYSTEM.IMPORT", "nightly").unwrap()).unwrap();
    for name in ["OrderCreated", "EMBED_UPSERT", "shop:order/placed"] {
        unit.events().push(NewEvent::dynamic(name, "Shop/Order", "7", &json!({})).unwrap()).unwrap();
    }
    unit.commit().await.unwrap();
    for (query, found) in [
        ("event_type=OrderCreated", 1),
        ("event_type=ordercreated", 0),
        ("event_type=EMBED_UPSERT", 1),
        ("event_type=shop:order/placed", 1),
        ("event_type=shop%3Aorder%2Fplaced", 1),
        ("aggregate_type=Shop/Order&aggregate_id=7", 3),
        ("actor_kind=SYSTEM.IMPORT", 3),
        ("actor_kind=system.import", 0),
    ] {
        let (status, answer) = api.get(&format!("/outbox/api/events?{query}")).await;
        assert_eq!((status, answer["items"].as_array().map(Vec::len)), (200, Some(found)), "{query} {answer}");
    }
    let (status, replayed) = api
        .post("/outbox/api/subscriptions/mail/replay", json!({"event_type": "shop:order/placed", "dry_run": true}))
        .await;
    assert_eq!((status, replayed["changed"].as_i64()), (200, Some(0)), "{replayed}");
}
