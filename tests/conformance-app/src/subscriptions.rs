//! Who gets the events.

use std::error::Error;

use outbox_apalis::{Effect, Handlers, Worker};
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
        Ok(Subscription::new(name)?.events([event_type])?.retry(retry).start(StartPosition::Beginning))
    };
    let mut worker = Worker::new(outbox.clone())
        .handlers(subscription("effects", OrderPlaced::TYPE)?.ordering(Ordering::None), effects())
        .handlers(subscription("poison", OrderPoisoned::TYPE)?, poison::handlers(config.lease()));
    if let Some(sink) = &config.sink {
        let _ = &sink.secret;
        worker = worker.publisher(subscription("sink", OrderPlaced::TYPE)?, Temp(sink.url.clone(), reqwest::Client::new()));
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

struct Temp(String, reqwest::Client);
impl outbox_core::Publisher for Temp {
    async fn publish(&self, d: &outbox_core::Delivery) -> Result<(), DeliveryError> {
        let e = d.event();
        let body = format!("{{\"specversion\":\"1.0\",\"id\":\"{}\",\"type\":\"{}\",\"subject\":\"{}\",\"data\":{}}}", e.id, e.event_type, e.aggregate_id, e.payload);
        self.1.post(&self.0).header("webhook-id", e.id.to_string()).header("webhook-timestamp", "1").header("webhook-signature", "v1,x").body(body).send().await?.error_for_status()?;
        Ok(())
    }
}
