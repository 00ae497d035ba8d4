use std::{
    convert::Infallible,
    future::ready,
    io::{self, Write},
    sync::LazyLock,
    time::Duration,
};

use apalis_board::axum::{
    framework::{ApiBuilder, RegisterRoute},
    ui::ServeUI,
};
use axum::{
    Router,
    http::{HeaderValue, StatusCode, header::CONTENT_SECURITY_POLICY},
    middleware::map_response,
    response::{
        Response,
        sse::{Event as SseEvent, KeepAlive, Sse},
    },
    routing::get,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use futures_util::{Stream, StreamExt, stream};
use outbox_seaorm::Outbox;
use sea_orm::DbErr;
use serde::{Deserialize, de::IgnoredAny};
use sha2::{Digest, Sha256};
use tokio::sync::broadcast::{self, error::RecvError};
use tracing::Subscriber;
use tracing_subscriber::{
    Layer,
    filter::filter_fn,
    fmt::{MakeWriter, format::JsonFields},
    registry::LookupSpan,
};

use crate::{OutboxBackend, task::DeliveryTask};

/// How many lines a page may be behind. One that reads more slowly misses some, and holds up nobody.
const LINES_KEPT: usize = 256;

/// What workers log about their attempts, line by line, for all pages that are open. It replaces the board's own
/// broadcast, in which a page that does not read takes the others' lines away and is never forgotten.
static LIVE: LazyLock<broadcast::Sender<String>> = LazyLock::new(|| broadcast::channel(LINES_KEPT).0);

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
    let api = api.build().fallback(async || StatusCode::NOT_FOUND);
    let router = Router::new().route("/api/v1/events", get(live)).nest_service("/api/v1", api);
    let policy = HeaderValue::try_from(policy()).map_err(|error| DbErr::Custom(error.to_string()))?;
    let with_policy = map_response(move |mut response: Response| {
        response.headers_mut().insert(CONTENT_SECURITY_POLICY, policy.clone());
        ready(response)
    });
    Ok(router.fallback_service(ServeUI::new()).layer(with_policy))
}

/// What the page may load and do: the board is a WebAssembly module that a script within the page starts. Styles on
/// elements are its own doing; nothing else is run, and nothing is loaded from elsewhere.
fn policy() -> String {
    let page = ServeUI::get_file("index.html").and_then(|file| file.contents_utf8()).unwrap_or_default();
    let scripts = page.split("<script").skip(1).filter_map(|rest| {
        let (_, text) = rest.split_once('>')?;
        text.split_once("</script>").map(|(script, _)| script)
    });
    let hashes = scripts.map(|script| format!(" 'sha256-{}'", BASE64_STANDARD.encode(Sha256::digest(script))));
    format!(
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'{}; style-src 'self' 'unsafe-inline'; \
         connect-src 'self'; img-src 'self' data:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
        hashes.collect::<String>()
    )
}

async fn live() -> Sse<impl Stream<Item = Result<SseEvent, Infallible>>> {
    let lines = stream::unfold(LIVE.subscribe(), |mut lines| async move {
        loop {
            match lines.recv().await {
                Ok(line) => return Some((line, lines)),
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    });
    let events = lines.map(|line| Ok(SseEvent::default().data(line)));
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(1)).text("keep-alive-text"))
}

/// A `tracing` layer that shows what workers log about their attempts on the dashboard, live.
#[must_use = "a layer does nothing before it is added to a subscriber"]
pub fn board_events<S>() -> impl Layer<S>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let attempts = filter_fn(|metadata| ["apalis", "outbox"].iter().any(|name| metadata.target().starts_with(name)));
    let lines = tracing_subscriber::fmt::layer().json().fmt_fields(JsonFields::new()).with_ansi(false);
    lines.with_writer(Live).log_internal_errors(false).with_filter(attempts)
}

#[derive(Clone, Copy)]
struct Live;

impl<'a> MakeWriter<'a> for Live {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl Write for Live {
    /// Gets whole lines: each event is formatted before it is written.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if LIVE.receiver_count() > 0 && is_about_an_attempt(line) {
            // Fails only if the last page was closed in between.
            let _ = LIVE.send(String::from_utf8_lossy(line).trim_end().to_owned());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The page shows lines that belong to a task.
fn is_about_an_attempt(line: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Line {
        #[serde(rename = "span")]
        _span: Task,
    }
    #[derive(Deserialize)]
    struct Task {
        #[serde(rename = "task_id")]
        _task_id: IgnoredAny,
    }
    serde_json::from_slice::<Line>(line).is_ok()
}
