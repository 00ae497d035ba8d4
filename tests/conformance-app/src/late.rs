//! What goes on after the response: tasks and bodies that outlive their request, and should not have what they hold.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use futures_util::{StreamExt, stream};
use outbox_axum::{Events, Tx};
use tokio::{sync::oneshot, time::sleep};

use crate::{events::OrderPlaced, tables};

/// How long a streamed body takes.
const STREAM: Duration = Duration::from_millis(200);
const CHUNKS: u32 = 4;

/// A part of the response that nobody reads. It is dropped with the response: when it has left, or was replaced.
#[derive(Clone)]
struct OnItsWay(#[expect(dead_code, reason = "its drop is the message")] Arc<oneshot::Sender<()>>);

/// Runs `work` when the response has left, or the layer has answered with another one, and `wait` has passed. Time
/// alone would not do: a commit on a slow disk takes longer than a short wait.
fn after(mut response: Response, wait: Duration, work: impl Future<Output = ()> + Send + 'static) -> Response {
    let (sender, gone) = oneshot::channel();
    response.extensions_mut().insert(OnItsWay(Arc::new(sender)));
    tokio::spawn(async move {
        // Nothing is ever sent: the error is the drop.
        let _ = gone.await;
        sleep(wait).await;
        work.await;
    });
    response
}

/// Keeps a handle in a task and writes through it when it is too late.
pub(crate) fn hold(response: Response, wait: Duration, tx: Tx, op: &str) -> Response {
    let op = op.to_owned();
    after(response, wait, async move { write(&tx, &op).await })
}

/// Pushes an event when it is too late, and counts that it was refused.
pub(crate) fn push(
    response: Response,
    wait: Duration,
    events: Events,
    event: OrderPlaced,
    errors: Arc<AtomicU64>,
) -> Response {
    after(response, wait, async move {
        match events.push(event) {
            Ok(id) => tracing::error!(event_id = %id, "an event was taken after its request had ended"),
            Err(error) => {
                tracing::debug!(%error, "a late event was refused, as it should be");
                errors.fetch_add(1, Ordering::Relaxed);
            }
        }
    })
}

/// The text at once, and white space until the time is over.
pub(crate) fn stream(text: String) -> Response {
    let start = stream::iter([Bytes::from(text)]);
    let rest = stream::iter(0..CHUNKS).then(|_| async {
        sleep(STREAM / CHUNKS).await;
        Bytes::from_static(b" ")
    });
    body(Body::from_stream(start.chain(rest).map(Ok::<_, Infallible>)))
}

/// The same with a body that writes through a handle.
pub(crate) fn stream_write(text: String, tx: Tx, op: &str) -> Response {
    let op = op.to_owned();
    let start = stream::iter([Bytes::from(text)]);
    let end = stream::once(async move {
        sleep(STREAM).await;
        write(&tx, &op).await;
        Bytes::from_static(b" ")
    });
    body(Body::from_stream(start.chain(end).map(Ok::<_, Infallible>)))
}

fn body(body: Body) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

/// An order that nobody asked for: a checker that finds it has found a leak.
async fn write(tx: &Tx, op: &str) {
    match tables::insert_order(tx, &format!("{op}/late"), "late").await {
        Ok(()) => tracing::error!(op, "a handle could be used after its request had ended"),
        Err(error) => tracing::debug!(op, %error, "a late statement was refused, as it should be"),
    }
}
