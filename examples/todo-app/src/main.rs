//! A todo list whose events are delivered by the outbox: the API and its page, the worker, and the operators' listener,
//! in one process (`all`, the default) or as separate ones (`serve`, `worker`).

mod activity;
mod config;
mod events;
mod migrations;
#[cfg(test)]
mod tests;
mod todos;

use std::{error::Error, future::Future, io::IsTerminal, net::SocketAddr, process::ExitCode, time::Duration};

use axum::{
    Json, Router,
    extract::{FromRef, State},
    response::Html,
    routing::{get, post},
};
use outbox_apalis::{WebhookPublisher, Worker};
use outbox_axum::{Operator, OutboxLayer, Server};
use outbox_core::{StartPosition, Subscription};
use outbox_seaorm::Outbox;
use tokio::{net::TcpListener, signal::unix::SignalKind, sync::watch};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::Config;

const USAGE: &str = "usage: todo-app [all | serve | worker | migrate]

  all      API, page, worker and operators' listener in one process (the default)
  serve    API and page only
  worker   worker and operators' listener only
  migrate  brings the database to this version and exits

Settings come from the environment: DATABASE_URL, HTTP_ADDR, OPS_ADDR, OPS_TOKEN, WEBHOOK_URL,
WEBHOOK_SECRET, OUTBOX_… (docs/configuration.md).";

/// Connections for reading; requests and the worker share one for writing.
const READERS: u32 = 4;

/// Connections of clients and of operators, together well below a common limit of open files (1,024).
const CLIENTS: usize = 512;
const OPERATORS: usize = 128;

#[derive(Clone, Copy, PartialEq)]
enum Command {
    All,
    Serve,
    Worker,
    Migrate,
}

#[tokio::main]
async fn main() -> ExitCode {
    let command = match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => Command::All,
        [command] => match command.as_str() {
            "all" => Command::All,
            "serve" => Command::Serve,
            "worker" => Command::Worker,
            "migrate" => Command::Migrate,
            "help" | "--help" | "-h" => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            _ => return usage_error(),
        },
        _ => return usage_error(),
    };
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sea_orm_migration=warn,apalis=warn"));
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_filter(filter);
    tracing_subscriber::registry().with(log).with(outbox_apalis::board_events()).init();
    match run(command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn usage_error() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}\n  because: {error}");
        cause = error.source();
    }
    text
}

async fn run(command: Command) -> Result<(), Box<dyn Error>> {
    let config = Config::from_env()?;
    let outbox = Outbox::connect(&config.database_url, READERS).await?;
    outbox_migrations::up::<migrations::Migrator>(outbox.writer()).await?;
    if command == Command::Migrate {
        println!("the database is up to date");
        return Ok(());
    }
    let (serves, works) = (command != Command::Worker, command != Command::Serve);
    let http = if serves { Some(listen("HTTP_ADDR", config.http_addr).await?) } else { None };
    let ops = if works { Some(listen("OPS_ADDR", config.ops_addr).await?) } else { None };
    let (http_addr, ops_addr) = (local(http.as_ref())?, local(ops.as_ref())?);

    // From here on every event is theirs, also if it commits before the worker runs.
    let worker = if works { Some(worker(&outbox, &config)?.start().await?) } else { None };
    let operator = if works { Some(operator(&outbox, &config).await?) } else { None };
    // Before anybody is told that the process runs: a signal from then on is a request to stop, not a kill.
    let mut terminated = tokio::signal::unix::signal(SignalKind::terminate())?;
    announce(http_addr, ops_addr, &config);

    let (stop, stopped) = watch::channel(false);
    let app = App { outbox, ops_url: ops_addr.map(|addr| format!("http://{addr}")), stopped };
    tokio::spawn(async move {
        tokio::select! {
            _ = terminated.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        let _ = stop.send(true);
    });
    tokio::join!(
        serve(http.map(|listener| (listener, app.router())), app.clone(), CLIENTS, config.grace),
        serve(ops.zip(operator), app.clone(), OPERATORS, config.grace),
        async {
            if let Some(worker) = worker {
                worker.run_until(app.stopped()).await;
            }
        },
    );
    Ok(())
}

/// What the handlers share.
#[derive(Clone, Debug)]
struct App {
    outbox: Outbox,
    ops_url: Option<String>,
    stopped: watch::Receiver<bool>,
}

impl FromRef<App> for Outbox {
    fn from_ref(app: &App) -> Self {
        app.outbox.clone()
    }
}

impl App {
    fn router(&self) -> Router {
        Router::new()
            .route("/todos", get(todos::list).post(todos::create))
            .route("/todos/import", post(todos::import))
            .route("/todos/{id}", get(todos::get).patch(todos::patch).delete(todos::delete))
            .layer(OutboxLayer::new(self.outbox.clone()))
            .route("/", get(|| async { Html(include_str!("index.html")) }))
            .route("/config", get(page_config))
            .route("/stats", get(activity::stats))
            .route("/activity", get(activity::activity))
            .route("/activity/live", get(activity::live))
            .with_state(self.clone())
    }

    /// Completes when the process is asked to stop.
    fn stopped(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut stopped = self.stopped.clone();
        async move {
            // An error means that nobody can ask any more.
            let _ = stopped.wait_for(|stopped| *stopped).await;
        }
    }
}

async fn page_config(State(app): State<App>) -> Json<serde_json::Value> {
    Json(serde_json::json!({ "ops": app.ops_url }))
}

fn worker(outbox: &Outbox, config: &Config) -> Result<Worker, Box<dyn Error>> {
    let retry = config.retry_policy()?;
    let named = |name: &str| -> Result<Subscription, Box<dyn Error>> {
        Ok(Subscription::new(name)?.events(["todo.*"])?.start(StartPosition::Beginning))
    };
    let subscription = |name: &str| named(name).map(|named| named.retry(retry));
    let mut worker = Worker::new(outbox.clone())
        .handlers(subscription("stats")?, activity::stats_handlers())
        .handlers(subscription("activity")?, activity::activity_handlers());
    if let Some((url, secret)) = &config.webhook {
        // A receiver on the same machine is what one tries first.
        let webhook = WebhookPublisher::new(url, secret)?.source("/todo-app")?.allow_loopback();
        // Somebody else's: it may be down for a night.
        let subscription = if config.sets_retries() { subscription("webhook")? } else { named("webhook")? };
        worker = worker.publisher(subscription, webhook);
    }
    Ok(config.apply(worker)?)
}

async fn operator(outbox: &Outbox, config: &Config) -> Result<Router, Box<dyn Error>> {
    let dashboard = outbox_apalis::dashboard(outbox).await?;
    Ok(Operator::new(outbox.clone(), &config.ops_token.0)?.dashboard(dashboard).into_router())
}

async fn listen(variable: &str, addr: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(addr).await.map_err(|error| {
        format!("cannot listen on {addr}: {error}; stop the program that uses it, or set {variable} to another address")
    })
}

fn local(listener: Option<&TcpListener>) -> std::io::Result<Option<SocketAddr>> {
    listener.map(TcpListener::local_addr).transpose()
}

fn announce(http: Option<SocketAddr>, ops: Option<SocketAddr>, config: &Config) {
    let show = |addr: Option<SocketAddr>| addr.map_or_else(|| "-".to_owned(), |addr| addr.to_string());
    println!("listening http={} ops={}", show(http), show(ops));
    if let Some(addr) = http {
        println!("  todo list   http://{addr}/");
    }
    if let Some(addr) = ops {
        println!("  operators   http://{addr}/");
        if let (token, true) = &config.ops_token {
            println!("              log in with any user name and the password {token} (set OPS_TOKEN to choose one)");
        }
    }
}

/// Serves until the process is asked to stop; requests under way then have the grace time to end.
async fn serve(listening: Option<(TcpListener, Router)>, app: App, connections: usize, grace: Duration) {
    let Some((listener, router)) = listening else { return };
    let server = Server::new(listener, router).max_connections(connections).shutdown_grace(grace);
    server.run_until(app.stopped()).await;
}
