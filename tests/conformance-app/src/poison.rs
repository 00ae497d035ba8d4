//! Events that harm whoever handles them.

use std::time::Duration;

use axum::{Json, http::StatusCode};
use outbox_apalis::Handlers;
use outbox_axum::{Error, Events};
use outbox_core::DeliveryError;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::events::OrderPoisoned;

/// What the handler of the event does.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Error,
    Panic,
    /// Ends the process.
    Abort,
    /// Never returns.
    Hang,
    /// Blocks the thread for two leases.
    Block,
    Permanent,
    /// Harms nobody, and takes 20 ms.
    None,
}

/// `POST /poison`
pub(crate) async fn push(events: Events, Json(event): Json<OrderPoisoned>) -> Result<(StatusCode, Json<Value>), Error> {
    let answer = json!({ "op": &event.op });
    events.push(event)?;
    Ok((StatusCode::CREATED, Json(answer)))
}

/// The subscription `poison`.
pub(crate) fn handlers(lease: Duration) -> Handlers {
    Handlers::new().on(move |event: OrderPoisoned, _| suffer(event.kind, lease))
}

async fn suffer(kind: Kind, lease: Duration) -> Result<(), DeliveryError> {
    match kind {
        Kind::Error => Err(DeliveryError::retry("poisoned")),
        Kind::Panic => panic!("poisoned"),
        Kind::Abort => std::process::abort(),
        Kind::Hang => std::future::pending().await,
        Kind::Block => {
            std::thread::sleep(lease * 2);
            Ok(())
        }
        Kind::Permanent => Err(DeliveryError::permanent("poisoned for good")),
        Kind::None => {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(())
        }
    }
}
