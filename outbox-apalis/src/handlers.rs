use std::{collections::HashMap, fmt, future::Future, panic::AssertUnwindSafe, sync::Arc};

use futures_util::{FutureExt, future::BoxFuture};
use outbox_core::{Context, Delivery, DeliveryError, Event, Events, RecordedEvent};
use outbox_seaorm::{CommitError, Finished, LaneReport, Next, Outbox, Settled, Tx, UnitOfWork, once_within};

use crate::{
    destination::{Destination, End, no_result, panic_message},
    task::Attempt,
};

/// The typed in-process handlers of one subscription, one for each event type and schema version.
///
/// Events of the subscription whose type has no handler here are left alone: no attempt is spent on them, a worker
/// that has the handler delivers them.
#[derive(Default)]
pub struct Handlers {
    plain: HashMap<(&'static str, i32), PlainHandler>,
    transactional: HashMap<(&'static str, i32), TxHandler>,
    upcasters: HashMap<(&'static str, i32), Upcaster>,
}

type Upcaster = Arc<dyn Fn(serde_json::Value) -> Result<serde_json::Value, DeliveryError> + Send + Sync>;

type PlainHandler =
    Arc<dyn Fn(Arc<RecordedEvent>, Delivery) -> BoxFuture<'static, Result<(), DeliveryError>> + Send + Sync>;
type TxHandler = Arc<dyn Fn(Arc<RecordedEvent>, Effect) -> BoxFuture<'static, Result<(), DeliveryError>> + Send + Sync>;

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handlers")
            .field("plain", &self.plain.keys())
            .field("transactional", &self.transactional.keys())
            .field("upcasters", &self.upcasters.keys())
            .finish()
    }
}

impl Handlers {
    /// Starts without handlers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a handler that runs **at least once** for each event of type `E`: with the same event id each time, again
    /// after an error, a panic, a timeout, or a crash before the success was stored.
    ///
    /// Its future is dropped when the attempt's time is over or the worker stops.
    ///
    /// # Panics
    ///
    /// If the type already has a handler.
    #[must_use]
    pub fn on<E, F, Fut>(mut self, handler: F) -> Self
    where
        E: Event,
        F: Fn(E, Delivery) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), DeliveryError>> + Send + 'static,
    {
        self.refuse_second::<E>();
        let run = move |event: Arc<RecordedEvent>, delivery: Delivery| match decode::<E>(&event) {
            Ok(event) => Box::pin(handler(event, delivery)) as BoxFuture<'static, _>,
            Err(error) => Box::pin(std::future::ready(Err(error))),
        };
        self.plain.insert((E::TYPE, E::SCHEMA_VERSION), Arc::new(run));
        self
    }

    /// Adds a handler whose effect on this database happens **exactly once** for each event of type `E`: what it
    /// writes through [`Effect::tx`], its entry in the inbox, and the acknowledgement commit together or not at all.
    /// Events it pushes are flushed with them, caused by this one.
    ///
    /// Effects elsewhere (a mail, a call) are at least once, as with [`on`](Self::on).
    ///
    /// While the database is busy or out of reach no attempt is spent, also if the handler panics because of it, unless it
    /// says that its error is [permanent](DeliveryError::permanent). A statement that does not answer within the attempt's
    /// time spends it: nobody knows whether the database or the statement is to blame.
    ///
    /// On SQLite no other transaction writes while the handler runs, not even one that renews a lease: there it has at
    /// most a third of the [lease](crate::Worker::lease), then the attempt has failed.
    ///
    /// # Panics
    ///
    /// If the type already has a handler.
    #[must_use]
    pub fn on_tx<E, F, Fut>(mut self, handler: F) -> Self
    where
        E: Event,
        F: Fn(E, Effect) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), DeliveryError>> + Send + 'static,
    {
        self.refuse_second::<E>();
        let run = move |event: Arc<RecordedEvent>, effect: Effect| match decode::<E>(&event) {
            Ok(event) => Box::pin(handler(event, effect)) as BoxFuture<'static, _>,
            Err(error) => Box::pin(std::future::ready(Err(error))),
        };
        self.transactional.insert((E::TYPE, E::SCHEMA_VERSION), Arc::new(run));
        self
    }

    /// Lifts the payloads of events of type `E` that were recorded with schema version `from` to the version after it,
    /// until one is reached that has a handler.
    ///
    /// ```
    /// use outbox_apalis::Handlers;
    /// # use outbox_core::Event;
    /// # #[derive(serde::Serialize, serde::Deserialize)]
    /// # struct Placed { total_cents: i64 }
    /// # impl Event for Placed {
    /// #     const TYPE: &'static str = "order.placed";
    /// #     const AGGREGATE_TYPE: &'static str = "order";
    /// #     const SCHEMA_VERSION: i32 = 2;
    /// #     fn aggregate_id(&self) -> String { String::new() }
    /// # }
    /// let handlers = Handlers::new()
    ///     .on(|event: Placed, _| async move { Ok(println!("{}", event.total_cents)) })
    ///     .upcast::<Placed>(1, |mut payload| {
    ///         payload["total_cents"] = (payload["total"].as_i64().unwrap_or_default() * 100).into();
    ///         Ok(payload)
    ///     });
    /// ```
    ///
    /// # Panics
    ///
    /// If `from` is not an earlier version of `E`, or has an upcaster already.
    #[must_use]
    pub fn upcast<E: Event>(
        mut self,
        from: i32,
        lift: impl Fn(serde_json::Value) -> Result<serde_json::Value, DeliveryError> + Send + Sync + 'static,
    ) -> Self {
        assert!(from < E::SCHEMA_VERSION, "version {from} of {:?} is not an earlier one", E::TYPE);
        let before = self.upcasters.insert((E::TYPE, from), Arc::new(lift));
        assert!(before.is_none(), "version {from} of {:?} already has an upcaster", E::TYPE);
        self
    }

    /// The version at which an event is handled, if it is.
    fn handled_version(&self, event: &RecordedEvent) -> Option<i32> {
        let mut version = event.schema_version;
        loop {
            let key = (event.event_type.as_str(), version);
            if self.plain.contains_key(&key) || self.transactional.contains_key(&key) {
                return Some(version);
            }
            version = self.upcasters.contains_key(&key).then_some(version + 1)?;
        }
    }

    /// The event as its handler knows it.
    fn lifted(&self, event: &Arc<RecordedEvent>, to: i32) -> Result<Arc<RecordedEvent>, DeliveryError> {
        if event.schema_version == to {
            return Ok(event.clone());
        }
        let refused = |error: &dyn fmt::Display| {
            let RecordedEvent { event_type, schema_version, .. } = &**event;
            DeliveryError::permanent(format!("{event_type} version {schema_version} cannot be lifted: {error}"))
        };
        let mut payload = serde_json::from_str(&event.payload).map_err(|error| refused(&error))?;
        for version in event.schema_version..to {
            if let Some(lift) = self.upcasters.get(&(event.event_type.as_str(), version)) {
                payload = lift(payload).map_err(|error| refused(&error))?;
            }
        }
        let payload = serde_json::Value::to_string(&payload);
        Ok(Arc::new(RecordedEvent { payload, schema_version: to, ..RecordedEvent::clone(event) }))
    }

    fn refuse_second<E: Event>(&self) {
        let key = (E::TYPE, E::SCHEMA_VERSION);
        assert!(
            !self.plain.contains_key(&key) && !self.transactional.contains_key(&key),
            "the event type {:?} version {} already has a handler in this subscription",
            E::TYPE,
            E::SCHEMA_VERSION
        );
    }
}

/// A payload that does not decode today will not decode tomorrow.
fn decode<E: Event>(event: &RecordedEvent) -> Result<E, DeliveryError> {
    event.decode().map_err(|error| DeliveryError::permanent(DeliveryError::from(error).message()))
}

/// What a transactional handler works with.
#[derive(Debug)]
pub struct Effect {
    tx: Tx,
    events: Events,
    delivery: Delivery,
}

impl Effect {
    /// The transaction of the effect. Begins with its first statement.
    #[must_use]
    pub fn tx(&self) -> &Tx {
        &self.tx
    }

    /// Events pushed here are flushed when the effect commits.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The delivery: the recorded event and the number of the attempt.
    #[must_use]
    pub fn delivery(&self) -> &Delivery {
        &self.delivery
    }
}

pub(crate) struct HandlersDestination {
    /// Without one there are no transactional handlers.
    pub(crate) outbox: Option<Outbox>,
    pub(crate) handlers: Handlers,
}

impl HandlersDestination {
    async fn effect(&self, outbox: &Outbox, handler: &TxHandler, event: &Arc<RecordedEvent>, attempt: &Attempt) -> End {
        let unit = outbox.begin(caused_by(event));
        if let Err(error) = unit.tx().begin_now().await {
            return End::Unavailable(DeliveryError::retry(format!("the transaction could not begin: {error}")));
        }
        // A handler may panic because of its database as well.
        let writing = AssertUnwindSafe(write(outbox, &unit, handler, event, attempt)).catch_unwind();
        let written = match tokio::time::timeout(attempt.time, writing).await {
            Ok(Ok(written)) => written,
            Ok(Err(panic)) => Err(DeliveryError::retry(panic_message(&*panic))),
            Err(_) => Err(DeliveryError::retry(no_result(attempt.time))),
        };
        if unit.lost_its_database() && !written.as_ref().is_err_and(DeliveryError::is_permanent) {
            unit.rollback().await;
            let ignored = || DeliveryError::retry("a statement of the transaction failed");
            return End::Unavailable(written.err().unwrap_or_else(ignored));
        }
        if let Err(error) = written {
            unit.rollback().await;
            return End::Outcome(Err(error).into());
        }
        let finished =
            Finished { position: event.position, attempts: attempt.number, log: attempt.log.clone(), error: None };
        let next = if attempt.last { Next::Yield } else { Next::Keep };
        let report = LaneReport { lane: attempt.lane.clone(), finished: vec![finished], next };
        match unit.commit_with(report).await {
            Ok(Settled::Done) => End::Settled,
            // Not knowing is as losing the lease: the next claim finds out.
            Ok(Settled::Superseded | Settled::Busy) | Err(CommitError::Unknown(_)) => End::Superseded,
            Err(error) if error.is_transient() => End::Unavailable(error.into()),
            Err(error) => End::Outcome(Err(error.into()).into()),
        }
    }
}

async fn write(
    outbox: &Outbox,
    unit: &UnitOfWork,
    handler: &TxHandler,
    event: &Arc<RecordedEvent>,
    attempt: &Attempt,
) -> Result<(), DeliveryError> {
    let tx = unit.tx();
    if !once_within(outbox, &tx, &attempt.subscription, event.id, attempt.time).await? {
        return Ok(());
    }
    let effect = Effect { tx, events: unit.events(), delivery: attempt.delivery(event) };
    handler(event.clone(), effect).await
}

/// Events that a handler pushes belong to the same story.
fn caused_by(event: &RecordedEvent) -> Context {
    let mut context = Context::default();
    context.tenant = event.tenant.clone();
    context.actor = event.actor.clone();
    context.correlation_id = event.correlation_id.clone();
    context.causation_id = Some(event.id.to_string());
    context.traceparent = event.traceparent.clone();
    context.tracestate = event.tracestate.clone();
    context
}

impl Destination for HandlersDestination {
    fn knows(&self, event: &RecordedEvent) -> bool {
        self.handlers.handled_version(event).is_some()
    }

    fn settles(&self, event: &RecordedEvent) -> bool {
        let version = self.handlers.handled_version(event);
        version.is_some_and(|version| self.handlers.transactional.contains_key(&(event.event_type.as_str(), version)))
    }

    fn is_outside(&self) -> bool {
        false
    }

    fn needs_database(&self) -> bool {
        !self.handlers.transactional.is_empty()
    }

    fn deliver<'a>(&'a self, event: &'a Arc<RecordedEvent>, attempt: &'a Attempt) -> BoxFuture<'a, End> {
        Box::pin(async move {
            let Some(version) = self.handlers.handled_version(event) else { return End::Unknown };
            let event = &match self.handlers.lifted(event, version) {
                Ok(event) => event,
                Err(error) => return End::Outcome(Err(error).into()),
            };
            let key = (event.event_type.as_str(), version);
            if let Some(handler) = self.handlers.plain.get(&key) {
                End::Outcome(handler(event.clone(), attempt.delivery(event)).await.into())
            } else if let (Some(handler), Some(outbox)) = (self.handlers.transactional.get(&key), &self.outbox) {
                self.effect(outbox, handler, event, attempt).await
            } else {
                End::Unknown
            }
        })
    }
}
