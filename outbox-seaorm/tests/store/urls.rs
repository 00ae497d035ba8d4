//! What a URL that leads nowhere is answered with.

use std::error::Error;

use outbox_seaorm::{ConnectError, Outbox};

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[tokio::test]
async fn another_kind_of_database_is_refused_in_one_sentence() {
    for (url, scheme) in [("mysql://me:hunter2@host/db", "mysql"), ("SQLITE://x", "SQLITE")] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::UnknownScheme { .. }), "{error:?}");
        let text = chain(&error);
        assert_eq!(
            text,
            format!(
                "the database URL starts with {scheme:?}; use sqlite://FILE?mode=rwc, for example \
                 sqlite://todo.db?mode=rwc, or postgres://USER:PASSWORD@HOST/DATABASE"
            )
        );
        assert!(!text.contains("hunter2") && !format!("{error:?}").contains("hunter2"));
    }
}

#[tokio::test]
async fn a_url_without_a_scheme_is_not_shown() {
    for url in ["hunter2", "", "hunter2:x@host/db", "hunter2@host/db", "me:hunter2://x", ":hunter2", "//hunter2"] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        let text = chain(&error);
        assert!(text.starts_with("the database URL has no scheme; use sqlite://FILE"), "{text}");
        assert!(!text.contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_one_sentence() {
    // A port that nobody listens on any more.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Outbox::connect(&format!("postgres://me:hunter2@127.0.0.1:{port}/db"), 1).await.unwrap_err();
    let text = chain(&error);
    assert!(text.starts_with("the database server could not be reached; check host"), "{text}");
    assert!(!text.contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{text}");
}

#[tokio::test]
async fn a_database_in_memory_is_refused() {
    for url in ["sqlite::memory:", "sqlite://:memory:", "sqlite://x?mode=memory"] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::InMemory), "{error:?}");
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_opened_is_one_sentence() {
    for url in [
        "sqlite:///missing/folder/todo.db?mode=rwc",
        "sqlite://me:hunter2@host/todo.db?mode=rwc",
        "sqlite:///missing/todo.db",
    ] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::Open(_)), "{error:?}");
        assert_eq!(
            error.to_string(),
            "the database could not be opened; check that the file's folder exists and can be written"
        );
        assert!(!chain(&error).contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_url_with_unknown_parts_is_one_sentence() {
    for url in [
        "sqlite:///missing/todo.db?mode=ro&password=hunter2",
        "sqlite:///missing/todo.db?mode=nonsense",
        "postgres://me:hunter2@localhost:99999/db",
    ] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::Url(_)), "{error:?}");
        let text = "the database URL cannot be read; check its spelling, and what stands after a '?'";
        assert_eq!(error.to_string(), text);
        assert!(!chain(&error).contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn what_the_driver_would_ignore_is_refused_by_name() {
    for (parameters, name) in [
        ("target_session_attrs=read-write", "target_session_attrs"),
        ("sslmode=disable&keepalives_idle=5", "keepalives_idle"),
        ("tcp_user_timeout=5", "tcp_user_timeout"),
        ("connect_timeout=hunter2", "connect_timeout"),
        ("options[jit]=off&channel_binding=require", "channel_binding"),
    ] {
        let error = Outbox::connect(&format!("postgres://me:hunter2@localhost/db?{parameters}"), 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::Parameter { .. }), "{error:?}");
        assert_eq!(
            chain(&error),
            format!(
                "the database URL asks for {name:?}, which this driver does not have; remove it. Limits of statements \
                 and sessions go into options[…], for example ?options[statement_timeout]=5s, those of TCP connections \
                 into the operating system"
            )
        );
        assert!(!format!("{error:?}").contains("hunter2"));
    }
}

#[tokio::test]
async fn several_hosts_are_refused_in_one_sentence() {
    for url in [
        "postgres://me:hunter2@one,two/db",
        "postgres://me:hunter2@one:5432,two:5432/db",
        "postgres:///db?host=one,two",
        "postgres://one/db?port=5432,5433",
    ] {
        let error = Outbox::connect(url, 1).await.unwrap_err();
        assert!(matches!(error, ConnectError::SeveralHosts), "{error:?}");
        assert!(!chain(&error).contains("hunter2") && !format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}
