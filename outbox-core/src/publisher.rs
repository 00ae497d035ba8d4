use std::future::Future;

use crate::{Delivery, DeliveryError, RetryPolicy};

/// Hands events to a destination outside this process: a webhook, a broker, a log.
///
/// ```
/// use outbox_core::{Delivery, DeliveryError, Publisher};
///
/// #[derive(Debug)]
/// struct Console;
///
/// impl Publisher for Console {
///     async fn publish(&self, delivery: &Delivery) -> Result<(), DeliveryError> {
///         println!("{} {}", delivery.event().event_type, delivery.event().payload);
///         Ok(())
///     }
/// }
/// ```
pub trait Publisher: Send + Sync + 'static {
    /// Hands over one event. May run more than once for the same event, with the same event id.
    ///
    /// # Errors
    ///
    /// [`DeliveryError`] says whether and when the delivery is tried again.
    ///
    /// # Cancel safety
    ///
    /// The future is dropped when the attempt's time is over or the worker stops; the delivery is then tried again.
    fn publish(&self, delivery: &Delivery) -> impl Future<Output = Result<(), DeliveryError>> + Send;

    /// The retry policy of subscriptions to this destination that [set none](crate::Subscription::retry). Defaults to
    /// [`RetryPolicy::default`].
    fn retry_policy(&self) -> RetryPolicy {
        RetryPolicy::default()
    }
}

/// Writes each event to the log at level `info`, without its payload.
#[derive(Clone, Copy, Debug, Default)]
pub struct LogPublisher;

impl Publisher for LogPublisher {
    async fn publish(&self, delivery: &Delivery) -> Result<(), DeliveryError> {
        let event = delivery.event();
        tracing::info!(
            event_id = %event.id,
            event_type = %event.event_type,
            aggregate_type = %event.aggregate_type,
            aggregate_id = event.aggregate_id,
            subscription = delivery.subscription(),
            attempt = delivery.attempt(),
            "event delivered to the log"
        );
        Ok(())
    }
}
