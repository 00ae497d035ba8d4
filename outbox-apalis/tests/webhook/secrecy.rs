use axum::http::StatusCode;
use outbox_apalis::WebhookPublisher;
use tokio::io::AsyncWriteExt as _;

use crate::fixture::{Receiver, SECRET, failure, publisher, raw};

const PATH: &str = "/services/T0001/aVerySecretTokenOfThePath?token=aSecretOfTheQuery&key=two%20words";

fn assert_quiet(text: &str) {
    for secret in ["MfKQ9r8", "aVerySecretTokenOfThePath", "token=", "aSecretOfTheQuery", "two%20words", "two words"] {
        assert!(!text.contains(secret), "{secret:?} is in {text:?}");
    }
}

#[tokio::test]
async fn a_destination_that_repeats_the_request_reveals_nothing() {
    for status in [StatusCode::BAD_REQUEST, StatusCode::BAD_GATEWAY, StatusCode::FOUND] {
        let echo = Receiver::start(move |request| {
            let body = format!("no route for {} {} (two words, aSecretOfTheQuery)", request.method, request.uri);
            (status, [("location", request.uri.to_string())], body)
        })
        .await;
        let error = failure(&publisher(&format!("http://{}{PATH}", echo.address))).await;
        assert_quiet(error.message());
        assert!(error.message().contains("no route for POST /services/T0001/…"), "{error}");
    }
}

#[tokio::test]
async fn a_secret_that_reaches_beyond_the_excerpt_is_not_shown_in_part() {
    let (token, padding) = ("t".repeat(300), format!("{}x", " ".repeat(1024 - 201)));
    let body = format!("{padding}{token}");
    let receiver = Receiver::start(move |_| (StatusCode::BAD_REQUEST, body.clone())).await;
    let error = failure(&publisher(&format!("{}?{token}", receiver.url()))).await;
    assert_eq!(error.message(), "the destination answered 400: x…");
}

#[tokio::test]
async fn failed_connections_reveal_nothing() {
    let garbage = raw(|mut connection| async move {
        let _ = connection.write_all(b"garbage\r\n\r\n").await;
    })
    .await;
    for origin in [
        "http://127.0.0.1:1".to_owned(),
        "http://10.0.0.1".to_owned(),
        "http://does-not-exist.invalid".to_owned(),
        format!("http://{garbage}"),
        format!("https://{garbage}"),
    ] {
        let publisher = WebhookPublisher::new(&format!("{origin}{PATH}"), SECRET).unwrap().allow("127.0.0.1").unwrap();
        let error = failure(&publisher).await;
        assert_quiet(error.message());
        assert!(error.message().contains(&origin), "{error}");
    }
}

#[test]
fn debug_shows_the_host_and_the_settings_only() {
    let publisher = publisher(&format!("https://hooks.example.com:8443{PATH}"));
    assert_quiet(&format!("{publisher:#?}"));
    assert_eq!(
        format!("{publisher:?}"),
        "WebhookPublisher { destination: \"https://hooks.example.com:8443\", signer: 1 secrets, source: \"/outbox\", \
         timeout: 15s, connect_timeout: 5s, allowed: [public, \"127.0.0.0/8\", \"::1/128\"], .. }"
    );
}

#[test]
fn refused_settings_do_not_show_them() {
    for (url, secret) in [
        (format!("https://user:aSecretOfTheQuery@example.com{PATH}"), SECRET),
        (format!("gopher://example.com{PATH}"), SECRET),
        (format!("https://exa mple.com{PATH}"), SECRET),
        (PATH.to_owned(), SECRET),
        (format!("https://example.com{PATH}"), "whsec_MfKQ9r8"),
        (format!("https://example.com{PATH}"), "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"),
    ] {
        let error = WebhookPublisher::new(&url, secret).unwrap_err();
        assert_quiet(&format!("{error} {error:?}"));
    }
}
