mod change;
mod console;
mod dead_letters;
mod events;
mod fields;
mod logins;
mod metrics;
mod refusal;
mod status;
mod subscriptions;
mod unrouted;

use axum::{
    Json, Router,
    extract::{Request, State},
    middleware::{Next, from_fn, from_fn_with_state},
    response::Response,
    routing::{get, post},
};
use http::{
    HeaderValue, Method, StatusCode,
    header::{
        ALLOW, AUTHORIZATION, CACHE_CONTROL, REFERRER_POLICY, WWW_AUTHENTICATE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
};
use outbox_seaorm::Outbox;
use serde::Serialize;
use serde_json::{Value, json};
use tower_layer::Layer;

use self::{
    change::{Actor, is_same_origin},
    logins::Refused,
};
use crate::{
    error::answer,
    token::{InvalidToken, Token},
};

/// What operators use, for a listener of its own: console, API, metrics, health checks, and the dashboard.
///
/// | path | answer |
/// |---|---|
/// | `GET /healthz` | 200 `ok` while the process runs |
/// | `GET /readyz` | 200 `ready` if the database answers, has the tables, and answers the worker of this process too, else 503 `not ready`; within 2 s |
/// | `GET /outbox` | the console, a page that shows and does what the API can |
/// | `GET /metrics` | Prometheus text: gauges of the database, counters of this process |
/// | `GET /outbox/api/status` | subscriptions with their counts, workers, and how much is not routed |
/// | `GET /outbox/api/events` | events, the newest first: `event_type`, `aggregate_type`, `aggregate_id`, `tenant`, `actor_kind`, `since`, `until` |
/// | `GET /outbox/api/events/{id}` | one event with payload, deliveries and their attempts |
/// | `GET /outbox/api/events/{id}/why` | why it was or was not delivered, for each subscription |
/// | `GET /outbox/api/dead-letters` | dead letters, the newest first: `subscription`, `event_type`, `since`, `until` |
/// | `POST /outbox/api/dead-letters/replay`, `…/discard` | `{"ids":["…"]}` or `{"filter":{…}}`, `"dry_run"`, `"reason"`: `{"matched":n,"changed":n}` |
/// | `POST /outbox/api/subscriptions/{name}/pause`, `…/resume` | `{"changed":n}` |
/// | `POST /outbox/api/subscriptions/{name}/replay` | one of `since`, `event_ids`, `event_type`; `"dry_run"`, `"reason"` |
/// | `GET /outbox/api/unrouted` | events that could not be routed, the newest first |
/// | `POST /outbox/api/unrouted/put-back`, `…/discard` | `{"ids":["…"]}` or `{"all":true}`, `"reason"`: `{"changed":n}` |
/// | `GET /outbox/api/audit` | the last 50 changes by operators |
/// | everything else | the [dashboard](Self::dashboard), or 404 |
///
/// Lists are pages, `{"items":[…],"next":"cursor"|null}`; `limit` (50, at most 500) and `cursor` ask for the next. An event
/// whose row somebody damaged has `null` for what cannot be read, and `unreadable` says what is wrong.
///
/// All but the first two need the token: `Authorization: Bearer TOKEN`, or HTTP basic authentication with the token as
/// the password of any user, so that a browser can log in; the audit shows that user's name. The more wrong tokens there
/// were lately, the longer each waits for its answer, 3 s at most; `outbox_operator_logins_refused_total` counts them.
/// Pages of other addresses may link to the console and the dashboard, and ask for nothing else. What changes something
/// must be JSON. Each change is stored with its audit entry or not at all; see
/// [`Outbox::replay_dead_letters`] for what a crash does to one that takes several transactions.
///
/// ```
/// use axum::Router;
/// use outbox_axum::{InvalidToken, Operator};
/// use outbox_seaorm::Outbox;
///
/// fn operator_router(outbox: Outbox, token: String, board: Router) -> Result<Router, InvalidToken> {
///     Ok(Operator::new(outbox, token)?.dashboard(board).into_router())
/// }
/// ```
#[derive(Debug)]
pub struct Operator {
    outbox: Outbox,
    token: Token,
    dashboard: Option<Router>,
}

impl Operator {
    /// Serves this outbox to those who know the token. Counts for `/metrics` from here on, unless the application has
    /// installed a recorder of the `metrics` crate itself: then the counters are there, and only gauges are here.
    ///
    /// # Errors
    ///
    /// [`InvalidToken`] if the token has less than 16 bytes, or white space or control characters, which no client could
    /// send: a line break at the end of a secret's file is noticed here. [`random_token`](crate::random_token) makes a
    /// good one.
    pub fn new(outbox: impl Into<Outbox>, token: impl Into<String>) -> Result<Self, InvalidToken> {
        metrics::install();
        Ok(Self { outbox: outbox.into(), token: Token::new(token.into())?, dashboard: None })
    }

    /// Serves a dashboard, such as apalis-board, under all paths that are not the operator's own. Defaults to none.
    ///
    /// It can be looked at only: other methods than GET and HEAD are answered with 405 before they reach it.
    #[must_use]
    pub fn dashboard(mut self, dashboard: Router) -> Self {
        self.dashboard = Some(dashboard);
        self
    }

    /// Builds the router.
    pub fn into_router(self) -> Router {
        let api = Router::new()
            .route("/status", get(status::status))
            .route("/events", get(events::list))
            .route("/events/{event_id}", get(events::show))
            .route("/events/{event_id}/why", get(events::why))
            .route("/dead-letters", get(dead_letters::list))
            .route("/dead-letters/replay", post(dead_letters::replay))
            .route("/dead-letters/discard", post(dead_letters::discard))
            .route("/subscriptions/{name}/pause", post(subscriptions::pause))
            .route("/subscriptions/{name}/resume", post(subscriptions::resume))
            .route("/subscriptions/{name}/replay", post(subscriptions::replay))
            .route("/unrouted", get(unrouted::list))
            .route("/unrouted/put-back", post(unrouted::put_back))
            .route("/unrouted/discard", post(unrouted::discard))
            .route("/audit", get(status::audit))
            .fallback(not_found)
            .method_not_allowed_fallback(method_not_allowed)
            .with_state(self.outbox.clone());
        // As a service, it also answers for the paths that it does not know.
        let guarded = Router::new()
            .route("/outbox", get(console::page))
            .route("/outbox/", get(console::page))
            .route("/outbox/console.js", get(console::script))
            .route("/outbox/console.css", get(console::style))
            .route("/metrics", get(metrics::metrics))
            .with_state(self.outbox.clone())
            .nest_service("/outbox/api", api);
        let guarded = match self.dashboard {
            Some(dashboard) => guarded.fallback_service(from_fn(look_only).layer(dashboard)),
            None => guarded.fallback(not_found),
        };
        let guarded = from_fn(own_pages_only).layer(guarded);
        // The token is asked for around the whole router, so no path of it can be forgotten.
        let guarded = from_fn_with_state((self.token, Refused::default()), require_token).layer(guarded);
        Router::new()
            .route("/healthz", get(|| async { "ok" }))
            .route("/readyz", get(ready))
            .with_state(self.outbox)
            .fallback_service(guarded)
            .layer(from_fn(secure))
    }
}

/// A keyset page: `next` is the `cursor` of the page after it.
fn page<T: Serialize>(items: Vec<T>, next: Option<i64>) -> Json<Value> {
    Json(json!({ "items": items, "next": next.map(|next| next.to_string()) }))
}

async fn ready(State(outbox): State<Outbox>) -> (StatusCode, &'static str) {
    match outbox.ready().await {
        Ok(()) => (StatusCode::OK, "ready"),
        Err(error) => {
            tracing::warn!(error = %outbox_core::error_text(&error), "not ready");
            (StatusCode::SERVICE_UNAVAILABLE, "not ready")
        }
    }
}

async fn not_found() -> Response {
    answer(StatusCode::NOT_FOUND, "there is nothing under this path")
}

async fn method_not_allowed() -> Response {
    answer(StatusCode::METHOD_NOT_ALLOWED, "this path does not take this method")
}

async fn look_only(request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let sentence = "jobs are pushed by committing events, not through the dashboard";
    let mut response = answer(StatusCode::METHOD_NOT_ALLOWED, sentence);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}

/// A browser that is logged in sends the token along with what any page asks for, and some of it is work: pages of other
/// addresses, also of another port of the same host, may only lead here.
async fn own_pages_only(request: Request, next: Next) -> Response {
    if is_same_origin(request.headers(), request.uri()) || leads_to_a_page(&request) {
        return next.run(request).await;
    }
    answer(StatusCode::FORBIDDEN, "a page of another address may lead here, but not ask for this")
}

/// A link that somebody followed, to something to look at.
fn leads_to_a_page(request: &Request) -> bool {
    let says = |name: &str, value: &str| request.headers().get(name).is_some_and(|said| said == value);
    let path = request.uri().path();
    let is_page = !["/api/", "/outbox/api", "/metrics"].iter().any(|start| path.starts_with(start));
    request.method() == Method::GET
        && says("sec-fetch-mode", "navigate")
        && says("sec-fetch-dest", "document")
        && is_page
}

async fn require_token(State((token, refused)): State<(Token, Refused)>, mut request: Request, next: Next) -> Response {
    if let Some(user) = token.user(request.headers()) {
        request.extensions_mut().insert(Actor(user));
        // What comes next has no use for the secret, and cannot print it.
        request.headers_mut().remove(AUTHORIZATION);
        return next.run(request).await;
    }
    // A browser asks without one first: that is no attempt.
    if request.headers().contains_key(AUTHORIZATION) {
        tokio::time::sleep(refused.one()).await;
    }
    let mut response = answer(StatusCode::UNAUTHORIZED, "this needs the operator token");
    let challenge = HeaderValue::from_static(r#"Basic realm="outbox", charset="UTF-8""#);
    response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    response
}

async fn secure(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    // A dashboard may know better, for its assets.
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}
