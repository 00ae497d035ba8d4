//! The command as operators run it.

use std::process::Command;

use outbox_core::{AttemptLog, Context, NewEvent, Subscription};
use outbox_seaorm::{Finished, LaneReport, Next, Outbox};
use outbox_test_servers::Postgres;
use sea_orm::{ConnectionTrait, DbBackend};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ran {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|_| panic!("{} {}", self.out, self.err))
    }
}

fn outbox(url: &str, arguments: &[&str]) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outbox"));
    let output = command.env("DATABASE_URL", url).env("USER", "anna").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn ok(url: &str, arguments: &[&str]) -> Ran {
    let ran = outbox(url, arguments);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{arguments:?} {}", ran.out);
    ran
}

fn json_of(url: &str, arguments: &[&str]) -> Value {
    ok(url, &[arguments, &["--json"]].concat()).json()
}

fn sqlite(directory: &TempDir) -> String {
    format!("sqlite://{}", directory.path().join("test.db").display())
}

/// The subscription `mail` with the dead letter of one event and another event that waits.
async fn filled(url: &str) -> (String, String) {
    ok(url, &["migrate", "up"]);
    let outbox = Outbox::connect(url, 1).await.unwrap();
    let id = outbox.register(&Subscription::new("mail").unwrap()).await.unwrap();
    let unit = outbox.begin(Context::default());
    for (name, aggregate) in [("order.placed", "a"), ("order.shipped", "b")] {
        unit.events().push(NewEvent::dynamic(name, "order", aggregate, &json!({"n": 1})).unwrap()).unwrap();
    }
    unit.commit().await.unwrap();
    outbox.route_waiting().await.unwrap();
    let lanes = outbox.claim(id, "w", 1, 1, std::time::Duration::from_secs(60)).await.unwrap().lanes;
    let (lane, event) = (lanes[0].lane.clone(), lanes[0].run[0].clone());
    let error = Some("no such address".to_owned());
    let log = AttemptLog::parse(r#"[{"attempt": 1, "error": "no such address", "worker": "w"}]"#);
    let finished = vec![Finished { position: event.position, attempts: 1, log, error }];
    outbox.settle(&[LaneReport { lane, finished, next: Next::Yield }]).await.unwrap();
    let page = outbox.events(&Default::default(), None, 10).await.unwrap();
    let other = page.events.iter().find(|each| each.id != event.id).unwrap();
    (event.id.to_string(), other.id.to_string())
}

async fn an_operator_finds_and_mends_a_dead_letter(url: &str) {
    let (dead, waiting) = filled(url).await;
    let status = json_of(url, &["status"]);
    assert_eq!((&status["subscriptions"][0]["pending"], &status["subscriptions"][0]["dead"]), (&json!(1), &json!(1)));
    assert!(ok(url, &["status"]).out.contains("no such address"));

    let list = json_of(url, &["dead", "list", "--subscription", "mail"]);
    let id = list["items"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!((&list["items"][0]["event_id"], &list["next"]), (&json!(dead), &json!(null)));
    assert_eq!(json_of(url, &["dead", "show", &id])["attempt_log"][0]["worker"], json!("w"));
    assert!(ok(url, &["dead"]).out.contains("order/a"));
    assert_eq!(json_of(url, &["events", "list", "--type", "order.shipped"])["items"][0]["id"], json!(waiting));
    assert_eq!(json_of(url, &["events", "show", &dead])["deliveries"][0]["state"], json!("dead"));
    assert_eq!(json_of(url, &["events", "show", &dead])["payload"], json!({"n": 1}));
    assert_eq!(json_of(url, &["why", &waiting])[0]["details"]["cause"], json!("due"));
    assert!(ok(url, &["why", &dead]).out.contains("no such address"));

    let dry = ok(url, &["dead", "replay", &id, "--dry-run"]);
    assert_eq!(dry.out, "would be replayed: 1\n");
    let replayed = json_of(url, &["dead", "replay", "--type", "order.placed", "--reason", "tested"]);
    assert_eq!(replayed, json!({"matched": 1, "changed": 1}));
    assert_eq!(json_of(url, &["dead", "discard", "--all"]), json!({"matched": 0, "changed": 0}));
    assert_eq!(
        json_of(url, &["replay", "--subscription", "mail", "--since", "1h"]),
        json!({"matched": 0, "changed": 0})
    );

    assert_eq!(ok(url, &["pause", "mail"]).out, "paused mail\n");
    assert_eq!(json_of(url, &["pause", "mail"]), json!({"changed": 0}));
    assert!(ok(url, &["status"]).out.contains("mail (paused)"));
    let doctor = outbox(url, &["doctor"]);
    assert!(doctor.code == Some(1) && doctor.out.contains("mail is paused"), "{}", doctor.out);
    assert_eq!(ok(url, &["resume", "mail"]).out, "resumed mail\n");
    assert_eq!(json_of(url, &["subscriptions"])["items"][0]["name"], json!("mail"));
    assert_eq!(json_of(url, &["purge", "--older-than", "0s", "--archive"])["events"], json!(0));

    let kept = outbox(url, &["subscriptions", "remove", "mail"]);
    assert!(kept.code == Some(1) && kept.err.contains("2 deliveries that are not finished"), "{}", kept.err);
    assert_eq!(json_of(url, &["subscriptions", "remove", "mail", "--yes"]), json!({"changed": 1}));
    let opened = Outbox::connect(url, 1).await.unwrap();
    if opened.writer().get_database_backend() == DbBackend::Postgres {
        // There, events stay for a minute.
        assert_eq!(json_of(url, &["purge", "--older-than", "0s"])["events"], json!(0));
        let aged = "update outbox_events set recorded_at = recorded_at - interval '1 minute'";
        opened.writer().execute_unprepared(aged).await.unwrap();
    }
    assert_eq!(json_of(url, &["purge", "--older-than", "0s"])["events"], json!(2));
    let actors: Vec<String> = opened.audit_entries(10).await.unwrap().into_iter().map(|entry| entry.actor).collect();
    assert!(actors.len() >= 5 && actors.iter().all(|actor| actor == "anna"), "{actors:?}");
}

/// `id` says whether the id can still be read.
async fn an_operator_finds_a_damaged_event(url: &str, damage: &str, unreadable: &str, id: bool) {
    let (dead, waiting) = filled(url).await;
    let opened = Outbox::connect(url, 1).await.unwrap();
    let sql = format!("update outbox_events set tags = '[1]', {damage} where aggregate_id = 'a'");
    opened.writer().execute_unprepared(&sql).await.unwrap();
    let items = json_of(url, &["events"])["items"].clone();
    let [whole, damaged] = items.as_array().unwrap().as_slice() else { panic!("{items}") };
    assert_eq!((&whole["id"], &whole["unreadable"]), (&json!(waiting), &json!(null)));
    assert_eq!((&damaged["event_type"], &damaged["aggregate_id"]), (&json!("order.placed"), &json!("a")));
    assert_eq!(damaged["id"], if id { json!(dead) } else { json!(null) });
    let told = damaged["unreadable"].as_str().unwrap();
    assert!(told.contains("tags") && told.contains(unreadable), "{told}");
    let text = ok(url, &["events"]).out;
    assert!(text.contains(&waiting) && text.contains("order/a") && text.contains(told), "{text}");
    if id {
        let shown = json_of(url, &["events", "show", &dead]);
        assert_eq!((&shown["unreadable"], &shown["payload"]), (&json!(told), &json!({"n": 1})));
        assert!(ok(url, &["events", "show", &dead]).out.starts_with(told));
        assert_eq!(outbox(url, &["why", &dead]).code, Some(0));
    }
    assert!(ok(url, &["dead"]).out.contains("order/a"));
    assert_eq!(ok(url, &["status"]).code, Some(0));
    assert_eq!(json_of(url, &["dead", "replay", "--all"]), json!({"matched": 1, "changed": 1}));
}

#[tokio::test]
async fn an_operator_finds_a_damaged_event_on_sqlite() {
    let directory = tempfile::tempdir().unwrap();
    let damage = "event_id = x'00', recorded_at = 'never'";
    an_operator_finds_a_damaged_event(&sqlite(&directory), damage, "event_id", false).await;
}

#[tokio::test]
async fn an_operator_finds_a_damaged_event_on_postgresql() {
    let damage = "recorded_at = '-infinity'";
    an_operator_finds_a_damaged_event(&Postgres::shared().database(), damage, "recorded_at", true).await;
}

#[tokio::test]
async fn an_operator_finds_and_mends_a_dead_letter_on_sqlite() {
    let directory = tempfile::tempdir().unwrap();
    an_operator_finds_and_mends_a_dead_letter(&sqlite(&directory)).await;
}

#[tokio::test]
async fn an_operator_finds_and_mends_a_dead_letter_on_postgresql() {
    an_operator_finds_and_mends_a_dead_letter(&Postgres::shared().database()).await;
}

#[tokio::test]
async fn what_is_unknown_or_not_understood_is_one_sentence_and_an_exit_code() {
    let directory = tempfile::tempdir().unwrap();
    let url = sqlite(&directory);
    let _ = filled(&url).await;
    let nobody = "00000000-0000-0000-0000-000000000000";
    for (arguments, code, sentence) in [
        (&["pause", "unknown"][..], 1, "there is no subscription \"unknown\""),
        (&["dead", "list", "--subscription", "unknown"], 1, "there is no subscription"),
        (&["dead", "replay"], 1, "which dead letters?"),
        (&["dead", "discard", "--dry-run"], 1, "which dead letters?"),
        (&["dead", "show", "999"], 1, "there is no dead letter 999"),
        (&["events", "show", nobody], 1, "there is no event"),
        (&["why", nobody], 1, "there is no event"),
        (&["why", "x"], 2, "invalid value"),
        (&["dead", "list", "--type", "Not A Name"], 2, "a name has 1 to 128"),
        (&["dead", "list", "--since", "yesterday"], 2, "write a time as"),
        (&["replay", "--subscription", "mail"], 2, "required"),
        (&["replay", "--subscription", "mail", "--since", "1h", "--type", "x"], 2, "cannot be used with"),
        (&["replay", "--subscription", "unknown", "--since", "1h"], 1, "there is no subscription"),
        (&["purge", "--keep", "x"], 2, "TYPE=TIME"),
        (&["migrate", "down"], 1, "add --yes"),
        (&["nonsense"], 2, "unrecognized"),
    ] {
        let ran = outbox(&url, arguments);
        assert_eq!((ran.code, ran.out.as_str()), (Some(code), ""), "{arguments:?}");
        assert!(ran.err.contains(sentence), "{arguments:?} {}", ran.err);
    }
    let missing = outbox("sqlite:///missing/folder/x.db", &["status"]);
    assert!(missing.code == Some(1) && missing.err.contains("could not be opened"), "{}", missing.err);
    let none = outbox("", &["status"]);
    assert!(none.code == Some(1) && none.err.contains("set DATABASE_URL"), "{}", none.err);
}

#[test]
fn the_tables_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let url = sqlite(&directory);
    let state = |url: &str| json_of(url, &["migrate", "status"])["items"][0]["state"].clone();
    assert_eq!(json_of(&url, &["migrate", "up"])["items"][0]["state"], json!("applied"));
    ok(&url, &["migrate", "up"]);
    assert_eq!(state(&url), json!("applied"));
    ok(&url, &["migrate", "down"]);
    assert_eq!(state(&url), json!("pending"));
    let status = outbox(&url, &["status"]);
    assert!(status.code == Some(1) && status.err.contains("no outbox tables"), "{}", status.err);
}

/// Somebody holds a snapshot: the log can only grow.
#[tokio::test]
async fn the_doctor_sees_a_log_that_cannot_shrink() {
    let directory = tempfile::tempdir().unwrap();
    let url = sqlite(&directory);
    ok(&url, &["migrate", "up"]);
    let log = "write-ahead log";
    assert!(!outbox(&url, &["doctor"]).out.contains(log));
    let opened = Outbox::connect(&url, 1).await.unwrap();
    for sql in ["create table blobs (blob blob)", "insert into blobs values (zeroblob(70000000))"] {
        opened.writer().execute_unprepared(sql).await.unwrap();
    }
    let doctor = outbox(&url, &["doctor"]);
    assert!(doctor.code == Some(1) && doctor.out.contains(log), "{}", doctor.out);
}
