use std::{error::Error, io::IsTerminal, net::SocketAddr, process::ExitCode, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{HeaderValue, header::AUTHORIZATION},
    middleware::map_request,
};
use outbox_axum::{Operator, Server};
use outbox_seaorm::Outbox;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{app::router, config::Config, subscriptions, tables::migrate};

const USAGE: &str = "usage: conformance-app [all | serve | worker | migrate]

  all      API, worker and operators' listener in one process (the default)
  serve    API only
  worker   worker and operators' listener only
  migrate  brings the database to this version and exits

Settings come from the environment: DATABASE_URL, DB_POOL, HTTP_ADDR, OPS_ADDR, OPS_TOKEN, SINK_URL, WEBHOOK_SECRET,
OUTBOX_… (docs/configuration.md).";

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

/// Runs the process with these arguments until it is asked to stop.
pub async fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    let arguments: Vec<String> = arguments.collect();
    let command = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [] | ["all"] => Command::All,
        ["serve"] => Command::Serve,
        ["worker"] => Command::Worker,
        ["migrate"] => Command::Migrate,
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    log();
    match run(command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn log() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,sea_orm_migration=warn,apalis=warn"));
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_filter(filter);
    tracing_subscriber::registry().with(log).with(outbox_apalis::board_events()).init();
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
    let outbox = Outbox::connect(&config.database_url, config.pool).await?;
    migrate(&outbox).await?;
    if command == Command::Migrate {
        println!("the database is up to date");
        return Ok(());
    }
    let (serves, works) = (command != Command::Worker, command != Command::Serve);
    let http = if serves { Some(listen("HTTP_ADDR", config.http_addr).await?) } else { None };
    let ops = if works { Some(listen("OPS_ADDR", config.ops_addr).await?) } else { None };

    // From here on every event is theirs, also if it commits before the worker runs.
    let worker = if works { Some(subscriptions::worker(&outbox, &config)?.start().await?) } else { None };
    let operator = if works { Some(operator(&outbox, &config).await?) } else { None };
    // Before anybody is told that there is a process to stop.
    let stopped = stop_on_signal()?;
    announce(http.as_ref(), ops.as_ref(), &config)?;
    tokio::join!(
        serve(http.map(|listener| (listener, router(outbox))), stopped.clone(), CLIENTS, config.grace),
        serve(ops.zip(operator), stopped.clone(), OPERATORS, config.grace),
        async {
            if let Some(worker) = worker {
                worker.run_until(until(stopped.clone())).await;
            }
        },
    );
    Ok(())
}

async fn operator(outbox: &Outbox, config: &Config) -> Result<Router, Box<dyn Error>> {
    let dashboard = outbox_apalis::dashboard(outbox).await?;
    let token = config.ops_token.0.clone();
    let long = long_enough(&token);
    let router = Operator::new(outbox.clone(), &long)?.dashboard(dashboard).into_router();
    if token == long {
        return Ok(router);
    }
    let (short, long) = (format!("Bearer {token}"), HeaderValue::try_from(format!("Bearer {long}"))?);
    Ok(router.layer(map_request(move |mut request: Request| {
        if let Some(sent) = request.headers_mut().get_mut(AUTHORIZATION).filter(|sent| **sent == short) {
            *sent = long.clone();
        }
        std::future::ready(request)
    })))
}

/// The contract of this application, which serves tests alone, names no shortest token; that of the operators' router is 16
/// bytes. A shorter one is repeated until it is taken, and so is what a client sends as a bearer.
fn long_enough(token: &str) -> String {
    token.repeat(16_usize.div_ceil(token.len().clamp(1, 16)))
}

async fn listen(variable: &str, addr: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(addr).await.map_err(|error| {
        format!("cannot listen on {addr}: {error}; stop the program that uses it, or set {variable} to another address")
    })
}

/// The line that tells where the listeners are; connections are accepted from now on.
fn announce(http: Option<&TcpListener>, ops: Option<&TcpListener>, config: &Config) -> std::io::Result<()> {
    let show = |listener: Option<&TcpListener>| match listener {
        Some(listener) => listener.local_addr().map(|addr| addr.to_string()),
        None => Ok("-".to_owned()),
    };
    println!("listening http={} ops={}", show(http)?, show(ops)?);
    if let (Some(_), (token, true)) = (ops, &config.ops_token) {
        println!("  operators log in with any user name and the password {token} (set OPS_TOKEN to choose one)");
    }
    Ok(())
}

/// Serves until the process is asked to stop; requests under way then have the grace time to end.
async fn serve(
    listening: Option<(TcpListener, Router)>,
    stopped: watch::Receiver<bool>,
    connections: usize,
    grace: Duration,
) {
    let Some((listener, router)) = listening else { return };
    let server = Server::new(listener, router).max_connections(connections).shutdown_grace(grace);
    server.run_until(until(stopped)).await;
}

/// Completes when the process is asked to stop.
async fn until(mut stopped: watch::Receiver<bool>) {
    // An error means that nobody can ask any more.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Turns true at SIGTERM and SIGINT.
fn stop_on_signal() -> std::io::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = stop.send(true);
    });
    Ok(stopped)
}

#[cfg(test)]
mod tests {
    use super::long_enough;

    #[test]
    fn a_short_token_is_repeated_and_a_long_one_is_kept() {
        assert_eq!(long_enough("secret"), "secretsecretsecret");
        assert_eq!(long_enough("sixteen-bytes-xx"), "sixteen-bytes-xx");
        assert_eq!(long_enough(""), "");
    }
}
