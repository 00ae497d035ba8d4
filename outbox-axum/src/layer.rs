use std::{fmt, sync::Arc, time::Duration};

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
/// # Other layers
///
/// One that is added earlier is inside: a timeout there answers 408 and the transaction rolls back. One that is added
/// later is outside: it sees the response after the commit, and the answers that this layer gives itself (500, 503, 409,
/// 408). So CORS, compression, request ids and the log of requests belong outside, or browsers do not get to see those
/// answers. A timeout outside leaves open what became of the request: what it cuts off before the commit has started
/// rolls back, a commit that has started ends by itself, and the client gets the timeout's answer in both cases, without
/// `outbox-outcome`. The same goes for a proxy's timeout, and for a client's own.
///
/// # A layer inside another one
///
/// A request has one transaction, and the outermost layer ends it. A layer of the same outbox inside another one (on a
/// route and on the router around it, say) lays its [`context`](Self::context) over the outer one's and does what
/// [`eager`](Self::eager) and [`max_age`](Self::max_age) say; the limits of the outer outbox hold. Outboxes are the same
/// when they are clones, or made of clones of one `DatabaseConnection`, with one table prefix.
///
/// A layer of another outbox there answers 500, and the log names both: two transactions cannot end as one. So does one
/// that does not find the outer layer's transaction, because a middleware between them replaced the request's
/// extensions, or because a handler calls a router of this process as if it was another service. Such a call has a
/// transaction of its own in a task: `tokio::spawn(router.oneshot(request)).await`.
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
    max_age: Option<Duration>,
    only_events: OnlyEvents,
    read: Option<Arc<context::Read>>,
}

/// How long a transaction may be open. What waits for it (on SQLite every writer) has given up long before, and so has
/// the proxy in front of most services.
const MAX_AGE: Duration = Duration::from_secs(30);

/// What becomes of a request that pushes events and executes no statement through [`Tx`](crate::Tx).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnlyEvents {
    /// It commits: for services whose events are all there is to store.
    #[default]
    Allow,
    /// It commits, with a warning in the log that names the route.
    Warn,
    /// It rolls back and answers 500; the log names the route.
    Refuse,
}

impl OutboxLayer {
    /// Uses this outbox, or the outbox of this `DatabaseConnection`.
    #[must_use]
    pub fn new(outbox: impl Into<Outbox>) -> Self {
        Self { outbox: outbox.into(), eager: false, max_age: None, only_events: OnlyEvents::Allow, read: None }
    }

    /// Begins the transaction before the handler runs, instead of with its first statement. Defaults to `false`.
    ///
    /// If it cannot begin, the handler is not called and the client gets 503 or 500. Costs a round trip and a
    /// connection for every request, also for those that need neither, and holds it while the body of the request arrives:
    /// on SQLite all other writers wait for a slow client then, at most for [`max_age`](Self::max_age).
    #[must_use]
    pub fn eager(mut self, eager: bool) -> Self {
        self.eager = eager;
        self
    }

    /// Sets how long a transaction may be open, from its BEGIN to the answer of the handler. Defaults to 30 s;
    /// `Duration::MAX` is without a limit.
    ///
    /// When it is over, the handler is dropped, the transaction rolls back, and the client gets 408 with
    /// `outbox-outcome: rolled-back`. Time before the first statement does not count: a slow upload that is read before is
    /// no matter. Nor does the commit, or the response's stream.
    ///
    /// # Panics
    ///
    /// If it is zero.
    #[must_use]
    pub fn max_age(mut self, max_age: Duration) -> Self {
        assert!(!max_age.is_zero(), "a transaction needs some time");
        self.max_age = Some(max_age);
        self
    }

    /// Sets what becomes of a request that pushes events and executes no statement through [`Tx`](crate::Tx), as one does
    /// that still writes with a connection or a transaction of its own: row and event are stored apart then. Defaults to
    /// [`OnlyEvents::Allow`]. Sees nothing with [`eager`](Self::eager).
    #[must_use]
    pub fn only_events(mut self, only_events: OnlyEvents) -> Self {
        self.only_events = only_events;
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
    /// use outbox_core::{Actor, Context};
    ///
    /// #[derive(Clone)]
    /// struct User {
    ///     id: String,
    ///     tenant: String,
    /// }
    ///
    /// # fn example(outbox: outbox_seaorm::Outbox) -> OutboxLayer {
    /// OutboxLayer::new(outbox).context(|parts| {
    ///     let mut context = Context::default();
    ///     // Put there by the application's authentication, outside of this layer.
    ///     if let Some(user) = parts.extensions.get::<User>() {
    ///         context.tenant = Some(user.tenant.clone());
    ///         context.actor = Actor::new("user", &user.id).ok();
    ///     }
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

    /// As it was set, if it was.
    pub(crate) fn own_max_age(&self) -> Option<Duration> {
        self.max_age
    }

    pub(crate) fn max_age_or_default(&self) -> Duration {
        self.max_age.unwrap_or(MAX_AGE)
    }

    pub(crate) fn about_only_events(&self) -> OnlyEvents {
        self.only_events
    }

    pub(crate) fn context_of(&self, parts: &Parts) -> Context {
        context::of_request(parts, self.read.as_deref())
    }

    /// What this layer adds to the context of the one around it, which has `seen` that extension.
    pub(crate) fn inner_context_of(&self, parts: &Parts, seen: Option<&Context>) -> Context {
        context::of_inner(parts, self.read.as_deref(), seen)
    }
}

impl fmt::Debug for OutboxLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutboxLayer")
            .field("outbox", &self.outbox)
            .field("eager", &self.eager)
            .field("max_age", &self.max_age_or_default())
            .field("only_events", &self.only_events)
            .finish_non_exhaustive()
    }
}

impl<S> Layer<S> for OutboxLayer {
    type Service = OutboxService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        OutboxService::new(self.clone(), inner)
    }
}
