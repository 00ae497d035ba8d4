use std::{
    any::Any,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    BoxError,
    body::{Body, Bytes, HttpBody},
    extract::MatchedPath,
    response::Response,
};
use futures_util::{FutureExt, future::BoxFuture};
use http::{Method, Request, Uri, request::Parts};
use outbox_core::error_text;
use outbox_seaorm::{TxSource, UnitOfWork};
use sea_orm::DbErr;
use tower_service::Service;

use crate::{
    Decision, OnlyEvents, OutboxLayer,
    error::FoundItBusy,
    grpc::Protocol,
    nested::{self, MaxAge, Outer, Place},
    outcome::{Outcome, Refusal},
};

/// The service that [`OutboxLayer`] makes.
#[derive(Clone, Debug)]
pub struct OutboxService<S> {
    layer: OutboxLayer,
    inner: S,
}

impl<S> OutboxService<S> {
    pub(crate) fn new(layer: OutboxLayer, inner: S) -> Self {
        Self { layer, inner }
    }
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for OutboxService<S>
where
    S: Service<Request<ReqBody>, Response = http::Response<ResBody>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    ReqBody: Send + 'static,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        // The clone is not ready; the service that is must be the one that is called.
        let clone = self.inner.clone();
        let inner = mem::replace(&mut self.inner, clone);
        Box::pin(serve(self.layer.clone(), inner, request))
    }
}

async fn serve<S, ReqBody, ResBody>(
    layer: OutboxLayer,
    inner: S,
    request: Request<ReqBody>,
) -> Result<Response, S::Error>
where
    S: Service<Request<ReqBody>, Response = http::Response<ResBody>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    let (parts, body) = request.into_parts();
    let route = Route::of(&parts);
    match Place::of(&parts.extensions) {
        Place::Outside => begin(layer, inner, route, parts, body).await,
        Place::Inside(outer) if outer.outbox().is_same_as(layer.outbox()) => {
            join(layer, inner, route, outer, parts, body).await
        }
        Place::Inside(outer) => Ok(misplaced(&route, &outer, &layer, OTHER_OUTBOX)),
        Place::Lost(outer) => Ok(misplaced(&route, &outer, &layer, LOST)),
    }
}

const OTHER_OUTBOX: &str = "an `OutboxLayer` is inside of one of another outbox; a request has one transaction, so give \
                            each route one of them";
const LOST: &str = "an `OutboxLayer` is inside of another one and does not find its transaction; keep the request's \
                    extensions in the middleware between them, or call another service in a task of its own";

/// The unit of work lives in this future: when the client hangs up, dropping it rolls back.
async fn begin<S, ReqBody, ResBody>(
    layer: OutboxLayer,
    mut inner: S,
    route: Route,
    mut parts: Parts,
    body: ReqBody,
) -> Result<Response, S::Error>
where
    S: Service<Request<ReqBody>, Response = http::Response<ResBody>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    let context = match catch_unwind(AssertUnwindSafe(|| layer.context_of(&parts))) {
        Ok(context) => context,
        Err(panic) => return Ok(panicked(&route, &*panic)),
    };
    let unit = layer.outbox().begin(context);
    let source = unit.source();
    if layer.is_eager()
        && let Err(error) = source.tx().begin_now().await
    {
        return Ok(not_begun(&route, &error));
    }
    let max_age = MaxAge::new(layer.max_age_or_default());
    parts.extensions.insert(Outer::new(&parts.extensions, max_age.clone()));
    parts.extensions.insert(source.clone());
    let request = Request::from_parts(parts, body);
    // Everything of the handler is gone after this statement, so a handle that is left is held by somebody else.
    let work = nested::around(source.clone(), async move { inner.call(request).await });
    let answer = max_age.limit(&source, AssertUnwindSafe(work).catch_unwind()).await;
    match answer {
        Some(Ok(Ok(response))) => Ok(end(unit, &layer, &route, response.map(Body::new)).await),
        Some(Ok(Err(error))) => {
            roll_back(unit);
            Err(error)
        }
        Some(Err(panic)) => {
            roll_back(unit);
            Ok(panicked(&route, &*panic))
        }
        None => {
            roll_back(unit);
            Ok(too_old(&route, max_age.get()))
        }
    }
}

/// Serves with the unit of work of the outer layer, which ends it.
async fn join<S, ReqBody, ResBody>(
    layer: OutboxLayer,
    mut inner: S,
    route: Route,
    unit: TxSource,
    mut parts: Parts,
    body: ReqBody,
) -> Result<Response, S::Error>
where
    S: Service<Request<ReqBody>, Response = http::Response<ResBody>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    let Outer { seen, max_age } = parts.extensions.remove().unwrap_or_default();
    let context = layer.inner_context_of(&parts, seen.as_ref());
    if let Err(error) = unit.events().lay_over(context) {
        return Ok(Refusal::of_context(&error.into()).answer(&route.protocol));
    }
    if layer.is_eager()
        && let Err(error) = unit.tx().begin_now().await
    {
        return Ok(not_begun(&route, &error));
    }
    if let Some(own) = layer.own_max_age() {
        max_age.set(own);
    }
    parts.extensions.insert(Outer::new(&parts.extensions, max_age.clone()));
    // The outer layer may wait for a longer limit already.
    match max_age.limit(&unit, inner.call(Request::from_parts(parts, body))).await {
        Some(answer) => Ok(answer?.map(Body::new)),
        None => Ok(too_old(&route, max_age.get())),
    }
}

async fn end(unit: UnitOfWork, layer: &OutboxLayer, route: &Route, mut response: Response) -> Response {
    match Decision::of(&mut response) {
        Decision::Rollback => {
            if response.extensions_mut().remove::<FoundItBusy>().is_some() {
                about_other_connections(&unit, route);
            }
            roll_back(unit);
            Outcome::RolledBack.mark(response)
        }
        Decision::Commit if only_events(&unit, layer, route) => {
            roll_back(unit);
            Refusal::INTERNAL.answer(&route.protocol)
        }
        Decision::Commit => match unit.commit().await {
            Ok(()) => Outcome::Committed.mark(response),
            Err(error) => {
                let (path, text) = (route.path(), error_text(&error));
                tracing::error!(method = %route.method, path, error = %text, "the request's transaction did not commit");
                Refusal::of_failed_commit(&error).answer(&route.protocol)
            }
        },
    }
}

/// Whether to refuse a request because it has pushed events and used no transaction.
fn only_events(unit: &UnitOfWork, layer: &OutboxLayer, route: &Route) -> bool {
    let about = layer.about_only_events();
    if about == OnlyEvents::Allow || unit.source().has_begun() || unit.events().is_empty() {
        return false;
    }
    let (method, path) = (&route.method, route.path());
    match about {
        OnlyEvents::Refuse => tracing::error!(%method, path, "{ONLY_EVENTS}"),
        _ => tracing::warn!(%method, path, "{ONLY_EVENTS}"),
    }
    about == OnlyEvents::Refuse
}

const ONLY_EVENTS: &str = "a request pushed events and executed nothing through `Tx`; what it wrote with another \
                           connection is stored apart from its events";

/// The transaction is open and good, so it was another connection that waited in vain: on SQLite for the write lock that
/// this transaction has, on PostgreSQL for a second connection or a row of its own.
fn about_other_connections(unit: &UnitOfWork, route: &Route) {
    if unit.source().has_begun() && !unit.lost_its_database() {
        let (method, path) = (&route.method, route.path());
        tracing::warn!(
            %method, path,
            "a statement beside the request's open transaction found the database busy; use `&tx` for it, or its own \
             transaction is what it waits for"
        );
    }
}

/// The rollback begins, and ends by itself: a statement that is in progress may take long, and the answer is an error
/// already. The unit of work is closed, so nothing of it can commit any more.
fn roll_back(unit: UnitOfWork) {
    let _ends_by_itself = unit.rollback().now_or_never();
}

fn misplaced(route: &Route, outer: &TxSource, layer: &OutboxLayer, what: &str) -> Response {
    let (outer, inner) = (outer.outbox().location(), layer.outbox().location());
    tracing::error!(method = %route.method, path = route.path(), outer, inner, "{what}");
    Refusal::INTERNAL.answer(&route.protocol)
}

fn not_begun(route: &Route, error: &DbErr) -> Response {
    let text = error_text(error);
    tracing::error!(method = %route.method, path = route.path(), error = %text, "the transaction did not begin");
    Refusal::of_failed_begin(error).answer(&route.protocol)
}

fn too_old(route: &Route, max_age: Duration) -> Response {
    let path = route.path();
    tracing::warn!(method = %route.method, path, ?max_age, "a transaction was open for too long and is rolled back");
    Refusal::TOO_OLD.answer(&route.protocol)
}

fn panicked(route: &Route, panic: &(dyn Any + Send)) -> Response {
    let text = panic.downcast_ref::<&str>().copied();
    let panic = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    tracing::error!(method = %route.method, path = route.path(), panic, "a handler panicked");
    Refusal::INTERNAL.answer(&route.protocol)
}

/// Where a request went, for the log, and how its client reads answers.
struct Route {
    protocol: Protocol,
    method: Method,
    matched: Option<MatchedPath>,
    uri: Uri,
}

impl Route {
    fn of(parts: &Parts) -> Self {
        let matched = parts.extensions.get::<MatchedPath>().cloned();
        let protocol = Protocol::of(&parts.headers);
        Self { protocol, method: parts.method.clone(), matched, uri: parts.uri.clone() }
    }

    fn path(&self) -> &str {
        self.matched.as_ref().map_or_else(|| self.uri.path(), MatchedPath::as_str)
    }
}
