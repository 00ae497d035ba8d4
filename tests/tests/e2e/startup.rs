//! What a newcomer reads when something is wrong: one clear sentence that says what to do.

use std::{process::Stdio, time::Duration};

use outbox_tests::{Database, command};
use sea_orm::ConnectionTrait;

use crate::example::start;

async fn refused(mode: &str, settings: &[(&str, &str)]) -> String {
    let run = command("todo-app", mode, settings).stdout(Stdio::null()).stderr(Stdio::piped()).output();
    let output = tokio::time::timeout(Duration::from_secs(20), run).await.expect("it ends").unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[tokio::test]
async fn an_unknown_database_url_says_which_are_known() {
    for url in ["mysql://user:hidden@host/db", "todo.db"] {
        let text = refused("all", &[("DATABASE_URL", url)]).await;
        assert!(text.contains("sqlite://") && !text.contains("hidden"), "{text}");
    }
}

#[tokio::test]
async fn a_folder_that_does_not_exist_is_named_as_the_cause() {
    let text = refused("all", &[("DATABASE_URL", "sqlite:///nowhere/at/all/todo.db")]).await;
    assert!(text.contains("folder exists"), "{text}");
}

#[tokio::test]
async fn a_port_in_use_names_the_variable_to_change() {
    let database = Database::sqlite();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    for variable in ["HTTP_ADDR", "OPS_ADDR"] {
        let text = refused("all", &[("DATABASE_URL", &database.url()), (variable, &addr)]).await;
        assert!(text.contains(&addr) && text.contains(&format!("set {variable}")), "{text}");
    }
}

#[tokio::test]
async fn a_database_from_a_newer_version_is_refused() {
    let database = Database::sqlite();
    let url = database.url();
    start("all", &database, &[]).await.kill().await;
    let outbox = database.open().await;
    let future = "insert into seaql_migrations values ('m29990101_000001_future', 0)";
    outbox.writer().execute_unprepared(future).await.unwrap();
    for mode in ["all", "serve", "worker", "migrate"] {
        let text = refused(mode, &[("DATABASE_URL", &url)]).await;
        assert!(text.contains("newer version") && text.contains("m29990101_000001_future"), "{text}");
    }
}

#[tokio::test]
async fn a_setting_that_makes_no_sense_is_named() {
    let database = Database::sqlite();
    for (name, value) in [
        ("HTTP_ADDR", "localhost"),
        ("OUTBOX_LEASE_MS", "soon"),
        ("OUTBOX_LEASE_MS", "1"),
        ("OUTBOX_MAX_ATTEMPTS", "0"),
        ("OUTBOX_CONCURRENCY", "0"),
        ("OUTBOX_BACKOFF_MAX_MS", "1"),
    ] {
        let text = refused("all", &[("DATABASE_URL", &database.url()), (name, value)]).await;
        assert!(text.starts_with("error: ") && text.contains(name), "{name}={value}: {text}");
    }
}

#[tokio::test]
async fn migrate_ends_and_an_unknown_command_shows_the_usage() {
    let database = Database::sqlite();
    let settings = [("DATABASE_URL", database.url())];
    let settings: Vec<_> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let output = command("todo-app", "migrate", &settings).output().await.unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "the database is up to date\n");
    let output = command("todo-app", "fly", &settings).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().starts_with("usage: todo-app"));
}
