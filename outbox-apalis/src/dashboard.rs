use std::sync::{Arc, LazyLock, Mutex};

use apalis_board::axum::{
    framework::{ApiBuilder, RegisterRoute},
    sse::{TracingBroadcaster, TracingSubscriber},
    ui::ServeUI,
};
use axum::{Extension, Router, http::StatusCode};
use outbox_seaorm::Outbox;
use sea_orm::DbErr;
use tracing::Subscriber;
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};

use crate::{OutboxBackend, task::DeliveryTask};

static EVENTS: LazyLock<Arc<Mutex<TracingBroadcaster>>> = LazyLock::new(TracingBroadcaster::create);

/// apalis-board over the outbox: its page and its API, for the root of a listener of its own.
///
/// It lists deliveries, workers and queues (one for each subscription that is registered by now). It has no
/// authentication: mount it behind one, as `outbox_axum::Operator::dashboard` does.
///
/// # Errors
///
/// If the subscriptions cannot be read.
pub async fn dashboard(outbox: &Outbox) -> Result<Router, DbErr> {
    let names: Vec<String> = outbox.status().await?.subscriptions.into_iter().map(|each| each.name).collect();
    // The pages that span all queues come with the first queue.
    let names = if names.is_empty() { vec!["none".to_owned()] } else { names };
    let api = names.into_iter().fold(ApiBuilder::new(Router::new()), |api, name| {
        let backend = OutboxBackend::listing(outbox.clone(), &name);
        RegisterRoute::<OutboxBackend, DeliveryTask>::register(api, &name, backend)
    });
    let api = api.build().layer(Extension(EVENTS.clone())).fallback(async || StatusCode::NOT_FOUND);
    Ok(Router::new().nest("/api/v1", api).fallback_service(ServeUI::new()))
}

/// A `tracing` layer that shows what workers log about their attempts on the dashboard, live.
#[must_use = "a layer does nothing before it is added to a subscriber"]
pub fn board_events<S>() -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let attempts = filter_fn(|metadata| ["apalis", "outbox"].iter().any(|name| metadata.target().starts_with(name)));
    // A slow or closed page is no error of this process.
    TracingSubscriber::new(&EVENTS).layer().log_internal_errors(false).with_filter(attempts)
}
