//! The operator router: closed by default, and quiet.

use axum::{
    Router,
    body::Body,
    routing::{any, get},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use http::{Method, Request};
use outbox_axum::Operator;
use outbox_core::{Context, Subscription};
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};

use crate::support::{Answer, Store, placed, send};

const TOKEN: &str = "correct-horse-battery";

async fn operator(store: &Store) -> Router {
    let dashboard = Router::new()
        .route("/", get(|| async { "board" }))
        .route("/api/v1/tasks", any(|headers: http::HeaderMap| async move { format!("pushed {headers:?}") }));
    Operator::new(store.outbox.clone(), TOKEN).unwrap().dashboard(dashboard).into_router()
}

async fn ask(router: &Router, method: Method, path: &str, authorization: Option<&str>) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(authorization) = authorization {
        request = request.header("authorization", authorization);
    }
    send(router, request.body(Body::empty()).unwrap()).await
}

async fn look(router: &Router, path: &str) -> Answer {
    ask(router, Method::GET, path, Some(&format!("Bearer {TOKEN}"))).await
}

fn basic(password: &str) -> String {
    format!("Basic {}", BASE64_STANDARD.encode(format!("anyone:{password}")))
}

#[tokio::test]
async fn an_unknown_token_is_a_401_on_every_path() {
    let store = Store::new().await;
    let router = operator(&store).await;
    // Wrong tokens are slowed down.
    tokio::time::pause();
    let wrong = [None, Some("Bearer wrong".to_owned()), Some("Bearer ".to_owned()), Some(basic("wrong"))];
    for path in ["/", "/outbox", "/outbox/api/status", "/outbox/api/x", "/api/v1/tasks", "/x", "/healthz/", "//healthz"]
    {
        for authorization in &wrong {
            for method in [Method::GET, Method::POST, Method::OPTIONS] {
                let answer = ask(&router, method, path, authorization.as_deref()).await;
                assert_eq!(answer.status, 401, "{path} {authorization:?}");
                assert_eq!(answer.header("www-authenticate"), Some(r#"Basic realm="outbox", charset="UTF-8""#));
                assert_eq!(answer.body, r#"{"error":"this needs the operator token"}"#);
            }
        }
    }
}

#[tokio::test]
async fn the_token_opens_as_bearer_and_as_the_password_of_any_user() {
    let store = Store::new().await;
    let router = operator(&store).await;
    for authorization in [format!("Bearer {TOKEN}"), format!("bearer {TOKEN}"), basic(TOKEN)] {
        for path in ["/outbox/api/status", "/"] {
            assert_eq!(ask(&router, Method::GET, path, Some(&authorization)).await.status, 200, "{path}");
        }
    }
}

#[tokio::test]
async fn status_counts_deliveries_per_subscription() {
    let store = Store::new().await;
    store.outbox.register(&Subscription::new("mail").unwrap()).await.unwrap();
    let unit = store.outbox.begin(Context::default());
    unit.events().push(placed("a")).unwrap();
    unit.events().push(placed("b")).unwrap();
    unit.commit().await.unwrap();

    let answer = look(&operator(&store).await, "/outbox/api/status").await;
    assert_eq!((answer.status.as_u16(), answer.header("content-type")), (200, Some("application/json")));
    let mut status: Value = serde_json::from_str(&answer.body).unwrap();
    let age = status["subscriptions"][0]["oldest_pending_age_seconds"].take();
    assert!(age.as_f64().unwrap() >= 0.0);
    let expected = json!({
        "subscriptions": [{
            "name": "mail", "pending": 2, "leased": 0, "delivered": 0, "dead": 0, "oldest_pending_age_seconds": null,
            "paused": false, "circuit": "closed", "last_error": null
        }],
        "workers": [],
        "unrouted": { "waiting": 0, "oldest_age_seconds": null, "set_aside": 0 }
    });
    assert_eq!(status, expected);
}

#[tokio::test]
async fn a_database_failure_is_a_503_without_its_text() {
    let store = Store::new().await;
    store.outbox.writer().execute_unprepared("drop table outbox_subscriptions").await.unwrap();
    let answer = look(&operator(&store).await, "/outbox/api/status").await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.body, r#"{"error":"the database does not answer; the log of the service says why"}"#);
}

#[tokio::test]
async fn health_checks_tell_nothing_but_ready_or_not() {
    let store = Store::new().await;
    let router = operator(&store).await;
    for (path, body) in [("/healthz", "ok"), ("/readyz", "ready")] {
        let answer = ask(&router, Method::GET, path, None).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (200, body));
    }
    store.outbox.writer().execute_unprepared("update outbox_meta set schema_version = 999").await.unwrap();
    let newer = ask(&router, Method::GET, "/readyz", None).await;
    store.outbox.writer().execute_unprepared("drop table outbox_meta").await.unwrap();
    let missing = ask(&router, Method::GET, "/readyz", None).await;
    for answer in [newer, missing] {
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (503, "not ready"));
    }
    assert_eq!(ask(&router, Method::GET, "/healthz", None).await.status, 200);
}

#[tokio::test]
async fn jobs_are_not_pushed_through_the_dashboard() {
    let store = Store::new().await;
    let router = operator(&store).await;
    let bearer = format!("Bearer {TOKEN}");
    for method in [Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
        let answer = ask(&router, method, "/api/v1/tasks", Some(&bearer)).await;
        assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, Some("GET, HEAD")));
        assert_eq!(answer.body, r#"{"error":"jobs are pushed by committing events, not through the dashboard"}"#);
    }
}

#[tokio::test]
async fn the_dashboard_does_not_see_the_token() {
    let store = Store::new().await;
    let answer = look(&operator(&store).await, "/api/v1/tasks").await;
    assert!(answer.body.starts_with("pushed") && !answer.body.contains("authorization"), "{}", answer.body);
}

#[tokio::test]
async fn the_dashboard_has_the_root_and_the_api_its_own_404() {
    let store = Store::new().await;
    let router = operator(&store).await;
    assert_eq!(look(&router, "/").await.body, "board");
    for path in ["/outbox/api", "/outbox/api/", "/outbox/api/unknown"] {
        let answer = look(&router, path).await;
        assert_eq!((answer.status.as_u16(), answer.header("content-type")), (404, Some("application/json")), "{path}");
    }
    let answer = ask(&router, Method::POST, "/outbox/api/status", Some(&format!("Bearer {TOKEN}"))).await;
    assert_eq!((answer.status.as_u16(), answer.header("content-type")), (405, Some("application/json")));
    let bare = Operator::new(store.outbox.clone(), TOKEN).unwrap().into_router();
    assert_eq!(look(&bare, "/").await.status, 404);
}

#[tokio::test]
async fn every_answer_has_the_security_headers() {
    let store = Store::new().await;
    let router = operator(&store).await;
    let bearer = format!("Bearer {TOKEN}");
    for (path, authorization, status) in [
        ("/healthz", None, 200),
        ("/readyz", None, 200),
        ("/", None, 401),
        ("/", Some(bearer.as_str()), 200),
        ("/nowhere", Some(bearer.as_str()), 404),
        ("/outbox/api/status", Some(bearer.as_str()), 200),
        ("/outbox/api/nowhere", Some(bearer.as_str()), 404),
    ] {
        let answer = ask(&router, Method::GET, path, authorization).await;
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("x-frame-options"), Some("DENY"), "{path}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{path}");
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{path}");
    }
}

#[tokio::test]
async fn a_short_token_is_refused_and_debug_shows_none() {
    let store = Store::new().await;
    for bad in ["", " ", "fifteen-bytes-x", "a-token-from-a-file\n"] {
        let error = Operator::new(store.outbox.clone(), bad).unwrap_err();
        assert!(error.to_string().contains("at least 16 bytes"), "{error}");
    }
    let operator = Operator::new(store.outbox.clone(), TOKEN).unwrap();
    assert!(!format!("{operator:?}").contains(TOKEN), "{operator:?}");
}

#[tokio::test]
async fn wrong_tokens_are_slowed_down_and_counted() {
    let store = Store::new().await;
    let router = operator(&store).await;
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    for n in 1..=40 {
        assert_eq!(ask(&router, Method::GET, "/", Some(&basic(&format!("wrong-{n}")))).await.status, 401);
        if n == 5 {
            assert!(begun.elapsed().as_millis() < 50, "who mistypes does not wait: {:?}", begun.elapsed());
        }
    }
    let taken = begun.elapsed();
    assert!(taken.as_secs() >= 20, "{taken:?}");
    assert_eq!(ask(&router, Method::GET, "/", None).await.status, 401);
    assert_eq!(look(&router, "/").await.status, 200);
    assert!((begun.elapsed() - taken).as_millis() < 50, "neither no token nor the right one waits");
    tokio::time::resume();
    let metrics = look(&router, "/metrics").await.body;
    let count = metrics.lines().find_map(|line| line.strip_prefix("outbox_operator_logins_refused_total "));
    assert!(count.is_some_and(|count| count.parse::<u32>().unwrap() >= 40), "{metrics}");
}

#[tokio::test]
async fn a_page_of_another_address_leads_here_and_asks_for_nothing() {
    let store = Store::new().await;
    let router = operator(&store).await;
    let paths = ["/", "/outbox", "/api/v1/tasks", "/outbox/api/status", "/metrics"];
    let from = async |path: &str, headers: &[(&str, &str)]| {
        let request = Request::builder().uri(path).header("authorization", format!("Bearer {TOKEN}"));
        let request = request.header("host", "ops.example:3001");
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        send(&router, request.body(Body::empty()).unwrap()).await.status.as_u16()
    };
    let link = |site| [("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    for site in ["same-site", "cross-site"] {
        for path in paths {
            let fetched = [("sec-fetch-site", site), ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")];
            assert_eq!(from(path, &fetched).await, 403, "{path}");
            let framed = [("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
            assert_eq!(from(path, &framed).await, 403, "{path}");
            let followed = if matches!(path, "/" | "/outbox") { 200 } else { 403 };
            assert_eq!(from(path, &link(site)).await, followed, "{path}");
        }
    }
    for path in paths {
        assert_eq!(from(path, &[("origin", "http://ops.example:3000")]).await, 403, "{path}");
        for own in [&[][..], &[("origin", "http://ops.example:3001")], &link("none"), &link("same-origin")] {
            assert_eq!(from(path, own).await, 200, "{path}");
        }
    }
}
