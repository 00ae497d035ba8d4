//! Which answers commit.

use axum::{Router, body::Body, response::IntoResponse, routing::post as post_to};
use futures_util::stream;
use http::{Request, StatusCode};
use outbox_axum::{Decision, Error, Events, OutboxLayer, Tx};
use sea_orm::{ConnectionTrait, DbBackend, Statement};

use crate::support::{Store, build_app, build_app_with, insert, place, placed, post, route, send};

async fn answers(status: u16) -> (u16, String, usize) {
    let app = build_app(move |tx: Tx| async move {
        place(&tx, "a").await;
        StatusCode::from_u16(status).unwrap()
    })
    .await;
    let answer = app.post().await;
    assert_eq!(app.store.orders().await.len(), app.store.payloads().await.len());
    (answer.status.as_u16(), answer.header("outbox-outcome").unwrap().to_owned(), app.store.orders().await.len())
}

#[tokio::test]
async fn commits_on_success() {
    let app = build_app(|tx: Tx, events: Events| async move {
        insert(&tx, "a").await?;
        events.push(placed("a"))?;
        Ok::<_, Error>((StatusCode::CREATED, "stored"))
    })
    .await;
    let answer = app.post().await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((201, "committed"), "stored"));
    assert_eq!(app.store.orders().await, ["a"]);
    assert_eq!(app.store.payloads().await, [r#"{"op":"a"}"#]);
}

#[tokio::test]
async fn commits_on_redirection_and_switching_protocols() {
    for status in [101, 204, 303, 304] {
        assert_eq!(answers(status).await, (status, "committed".to_owned(), 1));
    }
}

#[tokio::test]
async fn rolls_back_on_an_error_status() {
    for status in [400, 404, 409, 500, 503] {
        assert_eq!(answers(status).await, (status, "rolled-back".to_owned(), 0));
    }
}

#[tokio::test]
async fn rolls_back_when_an_extractor_after_the_transaction_refuses() {
    let app = build_app(|tx: Tx, body: axum::Json<u64>| async move {
        place(&tx, &body.to_string()).await;
    })
    .await;
    let answer = app.post().await;
    assert_eq!(answer.facts(), (415, "rolled-back"));
    assert!(app.store.is_empty().await);
}

#[tokio::test]
async fn rollback_override_on_200() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        (Decision::Rollback, r#"{"errors":["no"]}"#)
    })
    .await;
    let answer = app.post().await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((200, "rolled-back"), r#"{"errors":["no"]}"#));
    assert!(app.store.is_empty().await);
}

#[tokio::test]
async fn commit_override_on_409() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        (StatusCode::CONFLICT, Decision::Commit, "counted")
    })
    .await;
    let answer = app.post().await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((409, "committed"), "counted"));
    assert_eq!((app.store.orders().await.len(), app.store.payloads().await.len()), (1, 1));
}

#[tokio::test]
async fn an_override_does_not_commit_after_a_failed_statement() {
    let app = build_app(|tx: Tx| async move {
        place(&tx, "a").await;
        insert(&tx, "a").await.unwrap_err();
        (StatusCode::CONFLICT, Decision::Commit, "counted")
    })
    .await;
    assert_eq!(app.post().await.facts(), (500, "rolled-back"));
    assert!(app.store.is_empty().await);
}

#[tokio::test]
async fn a_get_that_touches_nothing_begins_no_transaction() {
    let app = build_app(|_tx: Tx, _events: Events| async { "hello" }).await;
    // Nobody else can begin one as long as this is open.
    let held = app.store.outbox.begin(outbox_core::Context::default());
    held.tx().begin_now().await.unwrap();
    let answer = send(&app.router, Request::get("/").body(Body::empty()).unwrap()).await;
    assert_eq!(answer.facts(), (200, "committed"));
    held.rollback().await;
}

#[tokio::test]
async fn a_read_through_the_applications_connection_begins_no_transaction() {
    let store = Store::new().await;
    let reader = store.outbox.reader().clone();
    let count = move || {
        let reader = reader.clone();
        async move {
            let sql = Statement::from_string(DbBackend::Sqlite, "select count(*) as n from orders");
            reader.query_one_raw(sql).await.unwrap().unwrap().try_get::<i64>("", "n").unwrap().to_string()
        }
    };
    let router = route(store.layer(), count);
    let held = store.outbox.begin(outbox_core::Context::default());
    held.tx().begin_now().await.unwrap();
    let answer = send(&router, post()).await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((200, "committed"), "0"));
    held.rollback().await;
}

#[tokio::test]
async fn only_events_are_stored() {
    let app = build_app(|events: Events| async move {
        events.push(placed("a")).unwrap();
        events.push(placed("b")).unwrap();
    })
    .await;
    assert_eq!(app.post().await.facts(), (200, "committed"));
    assert_eq!(app.store.payloads().await, [r#"{"op":"a"}"#, r#"{"op":"b"}"#]);
}

#[tokio::test]
async fn commit_happens_before_the_first_byte() {
    let store = Store::new().await;
    let witness = store.witness();
    let handler = move |tx: Tx| {
        let witness = witness.clone();
        async move {
            place(&tx, "a").await;
            let sql = "select op from orders union all select 'event' from outbox_events";
            let seen = async move {
                let rows = witness.query_all_raw(Statement::from_string(DbBackend::Sqlite, sql)).await.unwrap();
                let seen: Vec<String> = rows.iter().map(|row| row.try_get("", "op").unwrap()).collect();
                Ok::<_, std::io::Error>(seen.join(" "))
            };
            Body::from_stream(stream::once(seen)).into_response()
        }
    };
    let router = route(store.layer(), handler);
    let answer = send(&router, post()).await;
    assert_eq!((answer.facts(), answer.body.as_str()), ((200, "committed"), "a event"));
}

#[tokio::test]
async fn an_eager_transaction_begins_before_the_handler() {
    let app = build_app_with(|layer| layer.eager(true), |tx: Tx| async move { place(&tx, "a").await }).await;
    assert_eq!(app.post().await.facts(), (200, "committed"));
    assert_eq!(app.store.orders().await, ["a"]);

    let store = Store::new().await;
    let db = store.impatient().await;
    let held = outbox_seaorm::Outbox::new(db.clone()).begin(outbox_core::Context::default());
    held.tx().begin_now().await.unwrap();
    async fn never() {
        panic!("the handler must not run");
    }
    let router = Router::new().route("/", post_to(never)).layer(OutboxLayer::new(db).eager(true));
    let answer = send(&router, post()).await;
    assert_eq!((answer.facts(), answer.header("retry-after")), ((503, "rolled-back"), Some("1")));
    held.rollback().await;
}

#[tokio::test]
async fn an_error_of_the_inner_service_rolls_back_and_is_passed_on() {
    use tower::{Layer, Service, ServiceExt, service_fn};
    let store = Store::new().await;
    let failing = service_fn(|request: Request<Body>| async move {
        let (mut parts, _) = request.into_parts();
        let tx = <Tx as axum::extract::FromRequestParts<()>>::from_request_parts(&mut parts, &()).await.unwrap();
        place(&tx, "a").await;
        Err::<http::Response<Body>, _>("inner")
    });
    let mut service = store.layer().layer(failing);
    let error = service.ready().await.unwrap().call(post()).await.unwrap_err();
    assert_eq!(error, "inner");
    assert!(store.is_empty().await && store.can_write().await);
}
