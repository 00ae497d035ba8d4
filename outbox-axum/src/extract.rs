use std::{convert::Infallible, fmt, future::Future, ops::Deref, pin::Pin};

use async_trait::async_trait;
use axum::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    response::{IntoResponse, Response},
};
use http::{Extensions, StatusCode, request::Parts};
use outbox_seaorm::{NestedTx, SavepointError, TxSource, UnitOfWork};
use sea_orm::{
    AccessMode, ConnectionTrait, DbBackend, DbErr, ExecResult, IsolationLevel, QueryResult, Statement,
    TransactionError, TransactionOptions, TransactionTrait,
};

/// The transaction of the request, as an extractor. Use `&tx` wherever SeaORM takes a connection.
///
/// It begins with the first statement and ends before the response leaves: finish with it before, and do not move it
/// into a spawned task or the response's stream, or the request rolls back with a 500. Extractors, middleware and
/// handler of one request share one transaction; take it as often as you like.
///
/// A wrapper of [`outbox_seaorm::Tx`], which explains its states, and dereferences to it. Functions that also run
/// outside HTTP take that one or `&impl ConnectionTrait`; `&tx` fits both. SeaORM's `begin` is a savepoint
/// ([`NestedTx`]).
///
/// `Option<Tx>` is `None` on a route without the layer. A unit test that calls a handler as a function makes one from a
/// unit of work:
///
/// ```
/// use outbox_axum::{Events, Tx};
/// use outbox_core::{Context, NewEvent};
/// # use outbox_seaorm::{CommitError, Outbox};
///
/// async fn create(tx: Tx, events: Events) { /* the handler */ }
///
/// # async fn test(outbox: Outbox) -> Result<(), CommitError> {
/// let unit = outbox.begin(Context::default());
/// create(Tx::from(&unit), Events::from(&unit)).await;
/// unit.commit().await?; // or `rollback`, as the layer would
/// # Ok(())
/// # }
/// ```
///
/// # Cancel safety
///
/// A statement whose future is dropped halfway leaves the transaction failed: nothing is committed.
#[derive(Clone, Debug)]
pub struct Tx(pub outbox_seaorm::Tx);

/// The collector of the request, as an extractor: what is pushed is stored if and only if the request commits.
///
/// A cheap handle. It may outlive the response; pushing is an error then
/// ([`PushError::Closed`](outbox_core::PushError::Closed)). A wrapper of [`outbox_core::Events`], which has the
/// methods; functions that do not know axum take `&outbox_core::Events`, and `&events` fits. `Option<Events>` and
/// `Events::from(&unit)` are as with [`Tx`].
#[derive(Clone, Debug)]
pub struct Events(pub outbox_core::Events);

/// An extractor that was used on a route without [`OutboxLayer`](crate::OutboxLayer) around it. Answers 500; the text
/// names the fix.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error(
    "`{extractor}` used without `OutboxLayer` around it; add `.layer(OutboxLayer::new(…))` to the router, after its routes, \
     nested routers and fallback: one that is added later is outside of the layer, a middleware that is added later too, \
     and `route_layer` leaves out the fallback"
)]
#[non_exhaustive]
pub struct MissingLayer {
    extractor: &'static str,
}

impl Tx {
    /// The transaction of the request with these extensions, where there is no extractor: in a gRPC service,
    /// `Tx::from_extensions(request.extensions())`.
    ///
    /// # Errors
    ///
    /// [`MissingLayer`] if there is no layer around the service.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, MissingLayer> {
        Ok(Self(source(extensions, "Tx")?.tx()))
    }

    /// Runs `work` in a savepoint. If it answers with an error, or a statement in it failed, what it wrote is rolled
    /// back and the events pushed in it are dropped; the transaction goes on.
    ///
    /// Only the handle and the collector that `work` is given belong to it; others wait for its end, and are refused inside
    /// of `work`: [`outbox_seaorm::Tx::savepoint`] says more.
    ///
    /// ```
    /// use outbox_axum::{Error, Events, Tx};
    /// use outbox_core::NewEvent;
    /// use outbox_seaorm::SavepointError;
    /// use sea_orm::ConnectionTrait;
    ///
    /// async fn label(tx: Tx) -> Result<&'static str, Error> {
    ///     let labelled = tx
    ///         .savepoint(|tx, events| async move {
    ///             tx.execute_unprepared("insert into labels values ('urgent')").await?;
    ///             events.push(NewEvent::dynamic("label.created", "label", "urgent", &())?)?;
    ///             Ok::<_, Error>(())
    ///         })
    ///         .await;
    ///     match labelled {
    ///         Ok(()) => Ok("new label"),
    ///         Err(SavepointError::Work(Error::Database(_))) => Ok("the label was there"), // goes on, and commits
    ///         Err(error) => Err(error.into()),
    ///     }
    /// }
    /// # axum::Router::<()>::new().route("/", axum::routing::post(label));
    /// ```
    ///
    /// # Errors
    ///
    /// As [`outbox_seaorm::Tx::savepoint`]; [`Error`](crate::Error) takes all of them with `?`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the transaction failed: nothing can be committed.
    pub async fn savepoint<T, E, F, Fut>(&self, work: F) -> Result<T, SavepointError<E>>
    where
        F: FnOnce(Self, Events) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.0.savepoint(|tx, events| work(Self(tx), Events(events))).await
    }
}

impl Events {
    /// The collector of the request with these extensions, where there is no extractor.
    ///
    /// # Errors
    ///
    /// [`MissingLayer`] if there is no layer around the service.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, MissingLayer> {
        Ok(Self(source(extensions, "Events")?.events()))
    }
}

impl Deref for Tx {
    type Target = outbox_seaorm::Tx;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Deref for Events {
    type Target = outbox_core::Events;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Tx {
    type Rejection = MissingLayer;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        Self::from_extensions(&parts.extensions)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Events {
    type Rejection = MissingLayer;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Self::Rejection> {
        Self::from_extensions(&parts.extensions)
    }
}

/// `None` without the layer.
impl<S: Send + Sync> OptionalFromRequestParts<S> for Tx {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Option<Self>, Self::Rejection> {
        Ok(source(&parts.extensions, "Tx").ok().map(|source| Self(source.tx())))
    }
}

/// `None` without the layer.
impl<S: Send + Sync> OptionalFromRequestParts<S> for Events {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Option<Self>, Self::Rejection> {
        Ok(source(&parts.extensions, "Events").ok().map(|source| Self(source.events())))
    }
}

/// For tests that call handlers as functions.
impl From<&UnitOfWork> for Tx {
    fn from(unit: &UnitOfWork) -> Self {
        Self(unit.tx())
    }
}

/// For tests that call handlers as functions.
impl From<&UnitOfWork> for Events {
    fn from(unit: &UnitOfWork) -> Self {
        Self(unit.events())
    }
}

fn source<'a>(extensions: &'a Extensions, extractor: &'static str) -> Result<&'a TxSource, MissingLayer> {
    extensions.get().ok_or(MissingLayer { extractor })
}

impl MissingLayer {
    /// The status of the response: 500.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        StatusCode::INTERNAL_SERVER_ERROR
    }
}

impl IntoResponse for MissingLayer {
    fn into_response(self) -> Response {
        tracing::error!("{self}");
        (self.status(), self.to_string()).into_response()
    }
}

/// As that of [`outbox_seaorm::Tx`].
#[cfg(feature = "stream")]
impl sea_orm::StreamTrait for Tx {
    type Stream<'a> = <outbox_seaorm::Tx as sea_orm::StreamTrait>::Stream<'a>;

    fn get_database_backend(&self) -> DbBackend {
        ConnectionTrait::get_database_backend(&self.0)
    }

    fn stream_raw<'a>(
        &'a self,
        statement: Statement,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Self::Stream<'a>, DbErr>> + Send + 'a>> {
        self.0.stream_raw(statement)
    }
}

#[async_trait]
impl ConnectionTrait for Tx {
    fn get_database_backend(&self) -> DbBackend {
        self.0.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.0.execute_raw(statement).await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.0.execute_unprepared(sql).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.0.query_one_raw(statement).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.0.query_all_raw(statement).await
    }
}

#[async_trait]
impl TransactionTrait for Tx {
    type Transaction = NestedTx;

    async fn begin(&self) -> Result<NestedTx, DbErr> {
        self.0.begin().await
    }

    async fn begin_with_config(
        &self,
        isolation_level: Option<IsolationLevel>,
        access_mode: Option<AccessMode>,
    ) -> Result<NestedTx, DbErr> {
        self.0.begin_with_config(isolation_level, access_mode).await
    }

    async fn begin_with_options(&self, options: TransactionOptions) -> Result<NestedTx, DbErr> {
        self.0.begin_with_options(options).await
    }

    async fn transaction<F, T, E>(&self, callback: F) -> Result<T, TransactionError<E>>
    where
        F: for<'c> FnOnce(&'c NestedTx) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        self.0.transaction(callback).await
    }

    async fn transaction_with_config<F, T, E>(
        &self,
        callback: F,
        isolation_level: Option<IsolationLevel>,
        access_mode: Option<AccessMode>,
    ) -> Result<T, TransactionError<E>>
    where
        F: for<'c> FnOnce(&'c NestedTx) -> Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>> + Send,
        T: Send,
        E: fmt::Display + fmt::Debug + Send,
    {
        self.0.transaction_with_config(callback, isolation_level, access_mode).await
    }
}
