//! What a layer inside another one finds, and what it leaves to the outer one.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::Extensions;
use outbox_core::Context;
use outbox_seaorm::TxSource;

tokio::task_local! {
    /// The unit of work around what runs, for a layer whose request has lost its extensions.
    static AROUND: TxSource;
}

/// Where a layer is.
#[derive(Debug)]
pub(crate) enum Place {
    /// The outermost one of the request.
    Outside,
    /// Inside another one.
    Inside(TxSource),
    /// Inside another one, of which the request says nothing.
    Lost(TxSource),
}

impl Place {
    pub(crate) fn of(request: &Extensions) -> Self {
        match request.get() {
            Some(source) => Self::Inside(TxSource::clone(source)),
            None => AROUND.try_with(Clone::clone).map_or(Self::Outside, Self::Lost),
        }
    }
}

/// Runs the service of the outermost layer.
pub(crate) fn around<F: Future>(unit: TxSource, inner: F) -> impl Future<Output = F::Output> {
    AROUND.scope(unit, inner)
}

/// What a layer tells the layers inside of it, in the extensions of the request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outer {
    /// The application's context that it has seen.
    pub(crate) seen: Option<Context>,
    pub(crate) max_age: MaxAge,
}

impl Outer {
    pub(crate) fn new(request: &Extensions, max_age: MaxAge) -> Self {
        Self { seen: request.get().cloned(), max_age }
    }
}

/// How old a transaction may be. A layer inside may change it.
#[derive(Clone, Debug)]
pub(crate) struct MaxAge(Arc<Mutex<Duration>>);

impl Default for MaxAge {
    fn default() -> Self {
        Self::new(Duration::MAX)
    }
}

impl MaxAge {
    pub(crate) fn new(max_age: Duration) -> Self {
        Self(Arc::new(Mutex::new(max_age)))
    }

    pub(crate) fn get(&self) -> Duration {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set(&self, max_age: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = max_age;
    }

    /// The end of the work, or nothing if the transaction gets older than it may be.
    pub(crate) async fn limit<T>(&self, unit: &TxSource, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            end = work => Some(end),
            () = self.is_over(unit) => None,
        }
    }

    async fn is_over(&self, unit: &TxSource) {
        let begun = unit.begun().await;
        loop {
            let left = self.get().saturating_sub(begun.elapsed());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }
}
