use std::{fmt, sync::Arc};

use http::request::Parts;
use outbox_core::Context;
use outbox_seaorm::Outbox;
use tower_layer::Layer;

use crate::{OutboxService, context};

/// Gives each request one transaction and one collector of events, and ends both before the response leaves.
///
/// Commits when the handler answers 101, 2xx or 3xx; rolls back when it answers 4xx or 5xx, when it panics, and when
/// the client hangs up. A response can [decide otherwise](crate::Decision). The [crate page](crate) has the whole
/// table, and what a crash does at each moment.
///
/// A layer inside another one (on a route and on the router around it) uses the unit of work of the outer one: a
/// request has one transaction, and the outermost layer ends it.
///
/// Other layers work on both sides. One that is added earlier is inside: a timeout there answers 408 and the
/// transaction rolls back. One that is added later is outside: it sees the response after the commit.
///
/// ```no_run
/// use axum::{Router, routing::get};
/// use outbox_axum::OutboxLayer;
/// use outbox_seaorm::Outbox;
///
/// # async fn example() -> Result<(), outbox_seaorm::ConnectError> {
/// let outbox = Outbox::connect("sqlite://todo.db?mode=rwc", 4).await?;
/// let app: Router = Router::new().route("/", get(|| async { "hello" })).layer(OutboxLayer::new(outbox));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct OutboxLayer {
    outbox: Outbox,
    eager: bool,
    read: Option<Arc<context::Read>>,
}

impl OutboxLayer {
    /// Uses this outbox, or the outbox of this `DatabaseConnection`.
    #[must_use]
    pub fn new(outbox: impl Into<Outbox>) -> Self {
        Self { outbox: outbox.into(), eager: false, read: None }
    }

    /// Begins the transaction before the handler runs, instead of with its first statement. Defaults to `false`.
    ///
    /// If it cannot begin, the handler is not called and the client gets 503 or 500. Costs a round trip and a
    /// connection for every request, also for those that need neither.
    #[must_use]
    pub fn eager(mut self, eager: bool) -> Self {
        self.eager = eager;
        self
    }

    /// Reads what the events of a request share (tenant, actor, …) from the request, before the handler runs.
    ///
    /// Each field comes from the first of these that has it:
    ///
    /// 1. a [`Context`] in the request's extensions, put there by the application's own middleware outside of this
    ///    layer;
    /// 2. this function;
    /// 3. the headers: trace context from `traceparent` and `tracestate`, correlation id from `x-correlation-id`, else
    ///    `x-request-id`. Values that are not valid are ignored;
    /// 4. for the correlation id: a new UUID.
    ///
    /// `tracestate` follows `traceparent`: both come from the same place. What a handler sets through
    /// [`Events`](crate::Events) replaces all of it. Values from the application are taken as they are.
    ///
    /// ```
    /// use outbox_axum::OutboxLayer;
    /// use outbox_core::Context;
    ///
    /// # fn example(outbox: outbox_seaorm::Outbox) -> OutboxLayer {
    /// OutboxLayer::new(outbox).context(|parts| {
    ///     let mut context = Context::default();
    ///     let host = parts.headers.get("host").and_then(|host| host.to_str().ok());
    ///     context.tenant = host.and_then(|host| host.split_once('.')).map(|(tenant, _)| tenant.to_owned());
    ///     context
    /// })
    /// # }
    /// ```
    #[must_use]
    pub fn context(mut self, read: impl Fn(&Parts) -> Context + Send + Sync + 'static) -> Self {
        self.read = Some(Arc::new(read));
        self
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(crate) fn is_eager(&self) -> bool {
        self.eager
    }

    pub(crate) fn context_of(&self, parts: &Parts) -> Context {
        context::of_request(parts, self.read.as_deref())
    }
}

impl fmt::Debug for OutboxLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutboxLayer").field("outbox", &self.outbox).field("eager", &self.eager).finish_non_exhaustive()
    }
}

impl<S> Layer<S> for OutboxLayer {
    type Service = OutboxService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        OutboxService::new(self.clone(), inner)
    }
}
