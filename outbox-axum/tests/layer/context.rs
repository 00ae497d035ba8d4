//! What the events of a request share.

use axum::{Router, body::Body, middleware::from_fn, routing::post as post_to};
use http::Request;
use outbox_axum::Events;
use outbox_core::{Actor, Context};
use outbox_seaorm::entity::events::Model;

use crate::support::{App, Store, build_app, build_app_with, placed, post, send};

const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

async fn push(events: Events) {
    events.push(placed("a")).unwrap();
}

async fn recorded(app: &App, headers: &[(&'static str, &str)]) -> Model {
    let mut request = post();
    for (name, value) in headers {
        request.headers_mut().append(*name, http::HeaderValue::from_bytes(value.as_bytes()).unwrap());
    }
    assert_eq!(send(&app.router, request).await.facts(), (200, "committed"));
    app.store.events().await.pop().unwrap()
}

#[tokio::test]
async fn context_headers_end_up_in_the_events() {
    let app = build_app(push).await;
    let headers = [
        ("traceparent", TRACE),
        ("tracestate", "vendor=1"),
        ("x-correlation-id", "order 7"),
        ("x-request-id", "not this one"),
    ];
    let event = recorded(&app, &headers).await;
    assert_eq!(event.traceparent.as_deref(), Some(TRACE));
    assert_eq!(event.tracestate.as_deref(), Some("vendor=1"));
    assert_eq!(event.correlation_id.as_deref(), Some("order 7"));
    assert_eq!((event.tenant, event.actor_kind, event.causation_id), (None, None, None));
}

#[tokio::test]
async fn headers_that_are_not_valid_are_ignored() {
    let app = build_app(push).await;
    let headers =
        [("traceparent", "00-bad"), ("tracestate", "vendor=1"), ("x-correlation-id", "Käse"), ("x-request-id", "r-1")];
    let event = recorded(&app, &headers).await;
    assert_eq!((event.traceparent, event.tracestate), (None, None));
    assert_eq!(event.correlation_id.as_deref(), Some("r-1"));
}

#[tokio::test]
async fn all_events_of_a_request_without_an_id_share_a_new_correlation_id() {
    let app = build_app(|events: Events| async move {
        events.push(placed("a")).unwrap();
        events.push(placed("b")).unwrap();
    })
    .await;
    app.post().await;
    app.post().await;
    let ids: Vec<String> = app.store.events().await.into_iter().map(|event| event.correlation_id.unwrap()).collect();
    assert_eq!((&ids[0], &ids[2]), (&ids[1], &ids[3]));
    assert_ne!(ids[0], ids[2]);
}

#[tokio::test]
async fn the_applications_function_adds_to_the_headers() {
    let read = |parts: &http::request::Parts| {
        let mut context = Context::default();
        context.tenant = Some(parts.headers["x-tenant"].to_str().unwrap().to_owned());
        context.actor = Some(Actor::new("user", "7").unwrap());
        context
    };
    let app = build_app_with(|layer| layer.context(read), push).await;
    let event = recorded(&app, &[("x-tenant", "acme"), ("x-correlation-id", "c"), ("traceparent", TRACE)]).await;
    assert_eq!(event.tenant.as_deref(), Some("acme"));
    assert_eq!((event.actor_kind.as_deref(), event.actor_id.as_deref()), (Some("user"), Some("7")));
    assert_eq!((event.correlation_id.as_deref(), event.traceparent.as_deref()), (Some("c"), Some(TRACE)));
}

#[tokio::test]
async fn a_context_from_the_applications_middleware_wins() {
    let store = Store::new().await;
    let authenticate = |mut request: axum::extract::Request, next: axum::middleware::Next| async move {
        let mut context = Context::default();
        context.tenant = Some("acme".to_owned());
        context.correlation_id = Some("mine".to_owned());
        request.extensions_mut().insert(context);
        next.run(request).await
    };
    let router = Router::new().route("/", post_to(push)).layer(store.layer()).layer(from_fn(authenticate));
    let event = recorded(&App { router, store }, &[("x-correlation-id", "theirs"), ("traceparent", TRACE)]).await;
    assert_eq!((event.tenant.as_deref(), event.correlation_id.as_deref()), (Some("acme"), Some("mine")));
    assert_eq!(event.traceparent.as_deref(), Some(TRACE));
}

#[tokio::test]
async fn what_a_handler_sets_late_reaches_all_events_of_the_request() {
    let app = build_app(|events: Events| async move {
        events.push(placed("a")).unwrap();
        events.set_tenant("late").unwrap();
    })
    .await;
    let request = Request::post("/").header("x-correlation-id", "c").body(Body::empty()).unwrap();
    send(&app.router, request).await;
    let event = app.store.events().await.pop().unwrap();
    assert_eq!((event.tenant.as_deref(), event.correlation_id.as_deref()), (Some("late"), Some("c")));
}
