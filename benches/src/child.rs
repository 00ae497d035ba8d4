//! A worker in a process of its own: for what another process delivers, and for what a worker costs.

use std::{
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use outbox_apalis::{Handlers, Worker};
use outbox_core::Subscription;
use outbox_seaorm::Outbox;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    process::{Child as Process, ChildStdin, ChildStdout, Command},
};

use crate::{
    events::{Happened, SUBSCRIPTION},
    measure::Result,
};

/// What a worker process does; see [`Child`].
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many subscriptions, all for the same events.
    #[arg(long, default_value_t = 1)]
    subscriptions: usize,
    /// Three subscriptions each get the events of one group.
    #[arg(long)]
    groups: bool,
    /// How many milliseconds a handler takes. Then the lines have the end of the attempt as well.
    #[arg(long)]
    work: Option<u64>,
    #[arg(long)]
    fleet_rate: Option<f64>,
    #[arg(long)]
    fleet_concurrency: Option<usize>,
    /// Prints a line for each delivery: the event's number and the time in nanoseconds.
    #[arg(long)]
    print: bool,
    /// Ends after this many deliveries; otherwise when its standard input is closed.
    #[arg(long)]
    until: Option<usize>,
}

/// Delivers as told.
pub(crate) async fn run(url: &str, options: &Options) -> Result<()> {
    let outbox = Outbox::connect(url, 2).await?;
    let mut worker = Worker::new(outbox);
    let (delivered, mut deliveries) = tokio::sync::mpsc::unbounded_channel();
    for n in 0..options.subscriptions {
        let (delivered, print, work) = (delivered.clone(), options.print, options.work);
        let handlers = Handlers::new().on(move |event: Happened, _| {
            let (begun, delivered) = (nanoseconds(), delivered.clone());
            async move {
                if let Some(work) = work {
                    tokio::time::sleep(Duration::from_millis(work)).await;
                }
                match (print, work) {
                    (true, None) => println!("{} {begun}", event.n),
                    (true, Some(_)) => println!("{} {begun} {}", event.n, nanoseconds()),
                    (false, _) => {}
                }
                let _ = delivered.send(());
                Ok(())
            }
        });
        let name = if n == 0 { SUBSCRIPTION.to_owned() } else { format!("{SUBSCRIPTION}-{n}") };
        let subscription = Subscription::new(name)?;
        let subscription =
            if options.groups { subscription.required_tags([format!("group-{}", n / 3)]) } else { subscription };
        let subscription = match options.fleet_rate {
            Some(rate) => subscription.fleet_rate(rate)?,
            None => subscription,
        };
        let subscription = match options.fleet_concurrency {
            Some(deliveries) => subscription.fleet_concurrency(deliveries)?,
            None => subscription,
        };
        worker = worker.handlers(subscription, handlers);
    }
    let worker = worker.start().await?;
    println!("started");
    let until = options.until.unwrap_or(usize::MAX);
    let all = async move {
        for _ in 0..until {
            deliveries.recv().await;
        }
    };
    let closed = async {
        let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
    };
    worker
        .run_until(async {
            tokio::select! {
                () = all => {}
                () = closed => {}
            }
        })
        .await;
    println!("peak {}", status("self", "VmHWM:").unwrap_or_default());
    Ok(())
}

/// Nanoseconds of the clock that all processes of a machine share.
pub(crate) fn nanoseconds() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// A running worker process.
pub(crate) struct Child {
    process: Process,
    lines: Lines<BufReader<ChildStdout>>,
    /// Ends the worker when it is dropped.
    stop: Option<ChildStdin>,
}

impl Child {
    pub(crate) async fn start(url: &str, options: &[&str]) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["--database-url", url, "worker"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = BufReader::new(process.stdout.take().ok_or("no output")?).lines();
        let stop = process.stdin.take();
        let mut child = Self { process, lines, stop };
        child.line().await?;
        Ok(child)
    }

    pub(crate) async fn line(&mut self) -> Result<String> {
        Ok(self.lines.next_line().await?.ok_or("the worker ended early")?)
    }

    /// How much processor time it has used so far.
    pub(crate) fn processor_time(&self) -> Result<Duration> {
        let id = self.process.id().ok_or("the worker has ended")?;
        crate::processor::used_by(&id.to_string())
    }

    /// Stops it, or waits until it has done its deliveries; returns the most memory it had, in megabytes.
    pub(crate) async fn end(mut self, stop: bool) -> Result<f64> {
        if stop {
            drop(self.stop.take());
        }
        let mut peak = 0.0;
        while let Some(line) = self.lines.next_line().await? {
            if let Some(kilobytes) = line.strip_prefix("peak ") {
                peak = kilobytes.parse::<f64>()? / 1024.0;
                // Its runtime ends when nobody reads its standard input any more.
                drop(self.stop.take());
            }
        }
        self.process.wait().await?;
        Ok(peak)
    }
}

fn status(process: &str, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next().map(str::to_owned)
}
