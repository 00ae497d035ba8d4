use std::{
    any::Any,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    task::{Context, Poll},
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
use tower_service::Service;

use crate::{
    Decision, OutboxLayer,
    outcome::{self, Outcome},
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
        let mut inner = mem::replace(&mut self.inner, clone);
        if request.extensions().get::<TxSource>().is_some() {
            return Box::pin(async move { Ok(inner.call(request).await?.map(Body::new)) });
        }
        Box::pin(serve(self.layer.clone(), inner, request))
    }
}

/// The unit of work lives in this future: when the client hangs up, dropping it rolls back.
async fn serve<S, ReqBody, ResBody>(
    layer: OutboxLayer,
    mut inner: S,
    request: Request<ReqBody>,
) -> Result<Response, S::Error>
where
    S: Service<Request<ReqBody>, Response = http::Response<ResBody>>,
    ResBody: HttpBody<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    let (mut parts, body) = request.into_parts();
    let route = Route::of(&parts);
    let context = match catch_unwind(AssertUnwindSafe(|| layer.context_of(&parts))) {
        Ok(context) => context,
        Err(panic) => return Ok(panicked(&route, &*panic)),
    };
    let unit = layer.outbox().begin(context);
    if layer.is_eager()
        && let Err(error) = unit.tx().begin().await
    {
        let (path, text) = (route.path(), error_text(&error));
        tracing::error!(method = %route.method, path, error = %text, "the transaction did not begin");
        return Ok(outcome::of_failed_begin(&error));
    }
    parts.extensions.insert(unit.source());
    let request = Request::from_parts(parts, body);
    // Everything of the handler is gone after this statement, so a handle that is left is held by somebody else.
    let answer = AssertUnwindSafe(async move { inner.call(request).await }).catch_unwind().await;
    match answer {
        Ok(Ok(response)) => Ok(end(unit, &route, response.map(Body::new)).await),
        Ok(Err(error)) => {
            unit.rollback().await;
            Err(error)
        }
        Err(panic) => {
            unit.rollback().await;
            Ok(panicked(&route, &*panic))
        }
    }
}

async fn end(unit: UnitOfWork, route: &Route, mut response: Response) -> Response {
    let decided = response.extensions_mut().remove::<Decision>();
    match decided.unwrap_or_else(|| Decision::by_status(response.status())) {
        Decision::Rollback => {
            unit.rollback().await;
            Outcome::RolledBack.mark(response)
        }
        Decision::Commit => match unit.commit().await {
            Ok(()) => Outcome::Committed.mark(response),
            Err(error) => {
                let (path, text) = (route.path(), error_text(&error));
                tracing::error!(method = %route.method, path, error = %text, "the request's transaction did not commit");
                outcome::of_failed_commit(&error)
            }
        },
    }
}

fn panicked(route: &Route, panic: &(dyn Any + Send)) -> Response {
    let text = panic.downcast_ref::<&str>().copied();
    let panic = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    tracing::error!(method = %route.method, path = route.path(), panic, "a handler panicked");
    outcome::of_panic()
}

/// Where a request went, for the log.
struct Route {
    method: Method,
    matched: Option<MatchedPath>,
    uri: Uri,
}

impl Route {
    fn of(parts: &Parts) -> Self {
        let matched = parts.extensions.get::<MatchedPath>().cloned();
        Self { method: parts.method.clone(), matched, uri: parts.uri.clone() }
    }

    fn path(&self) -> &str {
        self.matched.as_ref().map_or_else(|| self.uri.path(), MatchedPath::as_str)
    }
}
