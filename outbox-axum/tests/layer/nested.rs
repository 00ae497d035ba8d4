//! A layer inside another one.

use axum::{
    Router,
    extract::Request,
    middleware::{Next, from_fn},
    routing::post as post_to,
};
use http::StatusCode;
use outbox_axum::{Decision, Events, OutboxLayer, Tx};
use outbox_core::Context;
use outbox_seaorm::Outbox;
use tower::ServiceExt;

use crate::{
    log,
    support::{Store, place, placed, post, route, send},
};

const INTERNAL: &str = r#"{"error":"the request failed; the log of the service says why"}"#;

async fn handler(tx: Tx) -> StatusCode {
    place(&tx, "handler").await;
    StatusCode::CREATED
}

/// A layer that gives this tenant to all events.
fn with_tenant(layer: OutboxLayer, tenant: &'static str) -> OutboxLayer {
    layer.context(move |_| {
        let mut context = Context::default();
        context.tenant = Some(tenant.to_owned());
        context
    })
}

#[tokio::test]
async fn it_uses_the_outer_unit_of_work() {
    let store = Store::new().await;
    let handler = |tx: Tx| async move {
        place(&tx, "handler").await;
        (StatusCode::CONFLICT, Decision::Commit)
    };
    let outer = |tx: Tx, request: Request, next: Next| async move {
        place(&tx, "middleware").await;
        drop(tx);
        let response = next.run(request).await;
        assert!(!response.headers().contains_key("outbox-outcome"), "the inner layer has ended nothing");
        response
    };
    let router = route(store.layer(), handler).layer(from_fn(outer)).layer(store.layer());
    assert_eq!(send(&router, post()).await.facts(), (409, "committed"));
    assert_eq!(store.orders().await, ["handler", "middleware"]);
    assert_eq!(store.payloads().await.len(), 2);
}

/// Every way in which an application puts a layer into another one; `/in` leads to the handler.
fn compositions(outer: &OutboxLayer, inner: &OutboxLayer) -> [(&'static str, Router); 7] {
    let routes = || Router::new().route("/in", post_to(handler));
    let inside = || routes().layer(inner.clone());
    let other = || Router::new().route("/other", post_to(handler));
    let nested = Router::new().route("/", post_to(handler)).layer(inner.clone());
    [
        ("layer", inside()),
        ("route_layer", routes().route_layer(inner.clone())),
        ("a route", Router::new().route("/in", post_to(handler).layer(inner.clone()))),
        ("merge", other().merge(inside())),
        ("nest", other().nest("/in", nested)),
        ("fallback", other().fallback_service(inside())),
        ("three", inside().layer(outer.clone())),
    ]
    .map(|(name, router)| (name, router.layer(outer.clone())))
}

fn request() -> Request {
    Request::post("/in").body(axum::body::Body::empty()).unwrap()
}

#[tokio::test]
async fn one_of_another_database_is_a_500_that_names_both() {
    log::record();
    let (a, b) = (Store::new().await, Store::new().await);
    for (name, router) in compositions(&a.layer(), &b.layer()) {
        let answer = send(&router, request()).await;
        assert_eq!((answer.facts(), answer.body.as_str()), ((500, "rolled-back"), INTERNAL), "{name}");
        assert!(a.is_empty().await && b.is_empty().await, "{name}");
    }
    let lines = log::lines_with(&a.file());
    assert!(lines.len() == 7 && lines.iter().all(|line| line.contains(&b.file())), "{lines:?}");
}

#[tokio::test]
async fn one_of_other_tables_is_a_500() {
    let store = Store::new().await;
    let inner = OutboxLayer::new(store.outbox.clone().table_prefix("shop_"));
    let router = route(inner, handler).layer(store.layer());
    assert_eq!(send(&router, post()).await.facts(), (500, "rolled-back"));
    assert!(store.is_empty().await);
}

#[tokio::test]
async fn one_of_the_same_connections_shares_the_unit_of_work() {
    let store = Store::new().await;
    let db = store.outbox.writer().clone();
    for (name, router) in compositions(&OutboxLayer::new(db.clone()), &OutboxLayer::new(db.clone())) {
        assert_eq!(send(&router, request()).await.facts(), (201, "committed"), "{name}");
        assert_eq!((store.orders().await.len(), store.payloads().await.len()), (1, 1), "{name}");
        sea_orm::ConnectionTrait::execute_unprepared(&db, "delete from orders; delete from outbox_events")
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn its_context_is_laid_over_the_outer_one() {
    let store = Store::new().await;
    let (outer, inner) = (with_tenant(store.layer(), "outer"), with_tenant(store.layer(), "inner"));
    let pushes = |events: Events| async move { events.push(placed("a")).map(|_| ()).unwrap() };
    let early = |events: Events, request: Request, next: Next| async move {
        events.push(placed("early")).unwrap();
        next.run(request).await
    };
    let router = route(inner, pushes).layer(from_fn(early)).layer(outer);
    let mut request = post();
    request.headers_mut().insert("x-correlation-id", "c-1".parse().unwrap());
    assert_eq!(send(&router, request).await.facts(), (200, "committed"));
    for event in store.events().await {
        assert_eq!((event.tenant.as_deref(), event.correlation_id.as_deref()), (Some("inner"), Some("c-1")));
    }
}

#[tokio::test]
async fn without_a_context_of_its_own_it_keeps_the_outer_one() {
    let store = Store::new().await;
    let pushes = |events: Events| async move { events.push(placed("a")).map(|_| ()).unwrap() };
    let authenticates = |events: Events, request: Request, next: Next| async move {
        events.set_tenant("authenticated").unwrap();
        next.run(request).await
    };
    let outside = |mut request: Request, next: Next| async move {
        let mut context = Context::default();
        (context.tenant, context.correlation_id) = (Some("outside".to_owned()), Some("c-1".to_owned()));
        request.extensions_mut().insert(context);
        next.run(request).await
    };
    let router = route(store.layer(), pushes).layer(from_fn(authenticates)).layer(store.layer());
    send(&router.layer(from_fn(outside)), post()).await;
    let event = store.events().await.pop().unwrap();
    assert_eq!((event.tenant.as_deref(), event.correlation_id.as_deref()), (Some("authenticated"), Some("c-1")));
}

#[tokio::test]
async fn a_context_that_was_added_between_two_layers_counts() {
    let store = Store::new().await;
    let pushes = |events: Events| async move { events.push(placed("a")).map(|_| ()).unwrap() };
    let between = |mut request: Request, next: Next| async move {
        let mut context = Context::default();
        context.tenant = Some("between".to_owned());
        request.extensions_mut().insert(context);
        next.run(request).await
    };
    let router = route(store.layer(), pushes).layer(from_fn(between)).layer(with_tenant(store.layer(), "outer"));
    send(&router, post()).await;
    assert_eq!(store.events().await[0].tenant.as_deref(), Some("between"));
}

#[tokio::test]
async fn a_context_that_is_not_valid_is_a_422() {
    let store = Store::new().await;
    let router = route(with_tenant(store.layer(), ""), handler).layer(store.layer());
    assert_eq!(send(&router, post()).await.facts(), (422, "rolled-back"));
    assert!(store.is_empty().await);
}

#[tokio::test]
async fn an_eager_one_begins_before_its_handler() {
    let store = Store::new().await;
    let outbox = Outbox::new(store.impatient().await);
    let held = store.outbox.begin(Context::default());
    held.tx().begin_now().await.unwrap();
    async fn never() {
        panic!("the handler must not run");
    }
    let inner = OutboxLayer::new(outbox.clone()).eager(true);
    let router = Router::new().route("/", post_to(never)).layer(inner).layer(OutboxLayer::new(outbox));
    let answer = send(&router, post()).await;
    assert_eq!((answer.facts(), answer.header("retry-after")), ((503, "rolled-back"), Some("1")));
    held.rollback().await;
}

/// A middleware that makes a new request, as some proxies and adapters do.
async fn forgetful(request: Request, next: Next) -> axum::response::Response {
    let (parts, body) = request.into_parts();
    let mut request = Request::new(body);
    (*request.method_mut(), *request.uri_mut()) = (parts.method, parts.uri);
    next.run(request).await
}

#[tokio::test]
async fn one_whose_request_lost_its_extensions_is_a_500() {
    log::record();
    let (store, other) = (Store::new().await, Store::new().await);
    for inner in [store.layer(), other.layer()] {
        let router = route(inner, handler).layer(from_fn(forgetful)).layer(store.layer());
        assert_eq!(send(&router, post()).await.facts(), (500, "rolled-back"));
        assert!(store.is_empty().await && other.is_empty().await);
    }
    assert_eq!(log::lines_with(&store.file()).len(), 2);
    assert_eq!(log::lines_with(&other.file()).len(), 1);
}

#[tokio::test]
async fn a_call_of_another_service_in_a_task_has_its_own_unit() {
    let (a, b) = (Store::new().await, Store::new().await);
    let service = route(b.layer(), handler);
    let calls = move |tx: Tx| async move {
        place(&tx, "caller").await;
        let answer = tokio::spawn(service.oneshot(post())).await.unwrap().unwrap();
        assert_eq!(answer.headers()["outbox-outcome"], "committed");
        StatusCode::BAD_GATEWAY
    };
    let router = route(a.layer(), calls);
    assert_eq!(send(&router, post()).await.facts(), (502, "rolled-back"));
    assert!(a.is_empty().await);
    assert_eq!(b.orders().await, ["handler"]);
}
