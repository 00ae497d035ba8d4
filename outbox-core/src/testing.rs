//! For tests of applications: a publisher that remembers what it was given, a clock that stands still, and a store in
//! memory.
//!
//! With the feature `testing`, which belongs into `[dev-dependencies]`. The guide's chapter about tests uses all of it.

mod memory;
mod model;

pub use memory::MemoryStore;
pub use model::{FinishedDelivery, LaneState, Model};

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::Duration,
};

use chrono::{DateTime, Utc};

use crate::{Clock, Delivery, DeliveryError, Event, Publisher};

/// A destination that takes every event, and remembers them in the order of their arrivals.
///
/// Clones are the same destination: give one to the worker and ask the other.
#[derive(Clone, Debug, Default)]
pub struct RecordingPublisher {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    deliveries: Vec<Delivery>,
    failures: VecDeque<DeliveryError>,
    waiting: Vec<Waker>,
}

impl RecordingPublisher {
    /// A destination that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers the next attempt with this error. May be called several times: the errors come one after another.
    pub fn fail_next(&self, error: DeliveryError) {
        self.lock().failures.push_back(error);
    }

    /// The deliveries that succeeded, repetitions included.
    #[must_use]
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.lock().deliveries.clone()
    }

    /// The events of one type among them.
    ///
    /// # Panics
    ///
    /// If one of them has another schema version or a payload of another shape.
    #[must_use]
    pub fn events<E: Event>(&self) -> Vec<E> {
        let deliveries = self.deliveries();
        let of_type = deliveries.iter().map(Delivery::event).filter(|event| event.event_type == E::TYPE);
        of_type.map(|event| event.decode().unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    /// Waits until at least `count` deliveries have succeeded, and returns all there are.
    ///
    /// Waits for ever if they do not come; put a timeout of your runtime around it.
    ///
    /// # Cancel safety
    ///
    /// Safe: nothing is taken away.
    pub async fn arrived(&self, count: usize) -> Vec<Delivery> {
        poll_fn(|context| {
            let mut seen = self.lock();
            if seen.deliveries.len() >= count {
                return Poll::Ready(seen.deliveries.clone());
            }
            seen.waiting.push(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Publisher for RecordingPublisher {
    async fn publish(&self, delivery: &Delivery) -> Result<(), DeliveryError> {
        let mut seen = self.lock();
        if let Some(error) = seen.failures.pop_front() {
            return Err(error);
        }
        seen.deliveries.push(delivery.clone());
        seen.waiting.drain(..).for_each(Waker::wake);
        Ok(())
    }
}

/// A clock that shows what it was set to. Clones are the same clock.
///
/// It decides when events *occurred*. Leases, delays and retries follow the database's clock, which no test can set: make
/// their times short instead.
#[derive(Clone, Debug)]
pub struct TestClock {
    now: Arc<Mutex<DateTime<Utc>>>,
}

impl TestClock {
    /// A clock that stands still at `now`.
    #[must_use]
    pub fn at(now: DateTime<Utc>) -> Self {
        Self { now: Arc::new(Mutex::new(now)) }
    }

    /// Puts it forward.
    ///
    /// # Panics
    ///
    /// If that is after the last time there is.
    pub fn advance(&self, by: Duration) {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner) += by;
    }
}

impl Clock for TestClock {
    fn now(&self) -> DateTime<Utc> {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        sync::atomic::{AtomicBool, Ordering},
        task::{Context, Wake},
    };

    use uuid::Uuid;

    use super::*;
    use crate::{Events, Limits, NewEvent, RecordedEvent};

    struct Flag(AtomicBool);

    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn delivery() -> Delivery {
        let event = RecordedEvent {
            position: 1,
            id: Uuid::nil(),
            event_type: "todo.created".to_owned(),
            schema_version: 1,
            aggregate_type: "todo".to_owned(),
            aggregate_id: "1".to_owned(),
            payload: "{}".to_owned(),
            occurred_at: DateTime::UNIX_EPOCH,
            recorded_at: DateTime::UNIX_EPOCH,
            tenant: None,
            actor: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            tags: std::collections::BTreeMap::new(),
            max_attempts: None,
        };
        Delivery::new(Arc::new(event), "test".into(), 1)
    }

    fn publish(publisher: &RecordingPublisher) -> Result<(), DeliveryError> {
        match pin!(publisher.publish(&delivery())).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => result,
            Poll::Pending => panic!("the publisher waits for nothing"),
        }
    }

    #[test]
    fn who_waits_for_deliveries_is_woken_by_the_last_of_them() {
        let publisher = RecordingPublisher::new();
        let flag = Arc::new(Flag(AtomicBool::new(false)));
        let waker = Waker::from(flag.clone());
        let mut context = Context::from_waker(&waker);
        let mut arrived = pin!(publisher.arrived(2));
        for n in 0..2 {
            assert!(arrived.as_mut().poll(&mut context).is_pending(), "after {n}");
            publish(&publisher).unwrap();
            assert!(flag.0.swap(false, Ordering::SeqCst), "after {n}");
        }
        assert!(matches!(arrived.poll(&mut context), Poll::Ready(deliveries) if deliveries.len() == 2));
    }

    #[test]
    fn an_attempt_that_was_told_to_fail_is_not_remembered() {
        let publisher = RecordingPublisher::new();
        publisher.fail_next(DeliveryError::permanent("no"));
        assert!(publish(&publisher).unwrap_err().is_permanent());
        assert!(publisher.deliveries().is_empty());
        publish(&publisher).unwrap();
        assert_eq!(publisher.deliveries().len(), 1);
    }

    #[test]
    fn events_occur_when_the_clock_says() {
        let clock = TestClock::at(DateTime::UNIX_EPOCH);
        let events = Events::with_clock(Limits::default(), crate::Context::default(), Arc::new(clock.clone()));
        let push = || events.push(NewEvent::dynamic("todo.created", "todo", "1", &1).unwrap()).unwrap();
        push();
        clock.advance(Duration::from_secs(60));
        push();
        let times: Vec<_> = events.close().events.iter().map(|event| event.occurred_at.unwrap().timestamp()).collect();
        assert_eq!(times, [0, 60]);
    }
}
