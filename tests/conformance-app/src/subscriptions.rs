//! Who gets the events.

use std::error::Error;

use outbox_apalis::{Effect, Handlers, WebhookPublisher, Worker};
use outbox_core::{DeliveryError, Event, Ordering, StartPosition, Subscription};
use outbox_seaorm::Outbox;

use crate::{
    config::Config,
    events::{OrderPlaced, OrderPoisoned},
    poison, tables,
};

/// The worker with all subscriptions. They start at the beginning: what was committed before the first worker came up
/// is theirs as well.
pub(crate) fn worker(outbox: &Outbox, config: &Config) -> Result<Worker, Box<dyn Error>> {
    let retry = config.retry_policy()?;
    let subscription = |name: &str, event_type: &str| -> Result<Subscription, Box<dyn Error>> {
        Ok(Subscription::new(name)?
            .events([event_type])?
            .retry(retry)
            .after_dead_letter(config.after_dead_letter)
            .start(StartPosition::Beginning))
    };
    let mut worker = Worker::new(outbox.clone())
        .handlers(subscription("effects", OrderPlaced::TYPE)?.ordering(Ordering::None), effects())
        .handlers(subscription("poison", OrderPoisoned::TYPE)?, poison::handlers(config.lease()));
    if let Some(sink) = &config.sink {
        let publisher = |url: &str| Ok::<_, Box<dyn Error>>(WebhookPublisher::new(url, &sink.secret)?.allow_loopback());
        let ordered = subscription("sink", OrderPlaced::TYPE)?.ordering(sink.ordering.clone());
        worker = worker.publisher(ordered, publisher(&sink.url)?);
        for (url, n) in sink.more.iter().zip(2..) {
            worker = worker.publisher(subscription(&format!("sink-{n}"), OrderPlaced::TYPE)?, publisher(url)?);
        }
    }
    Ok(config.apply(worker)?)
}

fn effects() -> Handlers {
    Handlers::new().on_tx(apply)
}

async fn apply(order: OrderPlaced, effect: Effect) -> Result<(), DeliveryError> {
    tables::apply(effect.tx(), effect.delivery().event().id, &order).await?;
    Ok(())
}
