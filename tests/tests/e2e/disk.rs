//! The conformance application on SQLite whose disk is full for a while.

use std::{fs::File, io::Write, path::Path, process::Command as StdCommand, time::Duration};

use outbox_core::Context;
use outbox_seaorm::Outbox;
use outbox_tests::{
    Process, command, eventually,
    ledger::{Answer, Ledger, Load, op_body},
    sink::{SECRET, Sink},
    texts,
};
use reqwest::Client;
use sea_orm::ConnectionTrait;
use tempfile::TempDir;
use tokio::process::Command;

/// A folder whose disk can be made full.
enum Disk {
    /// A file system of its own, in memory: SQLite gets `SQLITE_FULL`. For root.
    Small(TempDir),
    /// The process may write no larger files: SQLite gets `SQLITE_IOERR`.
    Limited(TempDir),
}

impl Disk {
    /// `None` if this user may mount nothing.
    fn small() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = StdCommand::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=12m", "tmpfs"]).arg(folder.path());
        mount.output().is_ok_and(|done| done.status.success()).then_some(Self::Small(folder))
    }

    fn path(&self) -> &Path {
        let (Self::Small(folder) | Self::Limited(folder)) = self;
        folder.path()
    }

    fn fill(&self, process: &Process) {
        match self {
            Self::Small(folder) => {
                let mut file = File::create(folder.path().join("full")).unwrap();
                while file.write_all(&[0; 4096]).is_ok() {}
            }
            Self::Limited(folder) => {
                let sizes =
                    std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len());
                limit(process, &sizes.max().unwrap_or_default().to_string());
            }
        }
    }

    fn free(&self, process: &Process) {
        match self {
            Self::Small(folder) => std::fs::remove_file(folder.path().join("full")).unwrap(),
            Self::Limited(_) => limit(process, "unlimited"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Self::Small(folder) = self {
            let _ = StdCommand::new("umount").arg("--lazy").arg(folder.path()).status();
        }
    }
}

fn limit(process: &Process, bytes: &str) {
    let limit = format!("--fsize={bytes}:unlimited");
    let status = StdCommand::new("prlimit").args(["--pid", &process.id().to_string(), &limit]).status().unwrap();
    assert!(status.success(), "prlimit {limit}");
}

/// With the signal for a file that gets too large ignored, so that a write is an error.
async fn start(settings: &[(&str, &str)]) -> Process {
    let direct = command("conformance-app", "all", settings);
    let direct = direct.as_std();
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"trap "" XFSZ; exec "$0" "$@""#]).arg(direct.get_program()).args(direct.get_args());
    shell.env_clear().kill_on_drop(true);
    shell.envs(direct.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Process::started(shell).await
}

/// One op, in the ledger.
async fn send(ledger: &Ledger, url: &str, op: &str, mode: &str) -> Answer {
    ledger.note(op, 2, Answer::Unknown);
    let answer = Answer::of(&Client::new().post(format!("{url}/op")).json(&op_body(op, "k", 2, mode)).send().await);
    ledger.note(op, 2, answer);
    answer
}

async fn readiness(app: &Process) -> u16 {
    reqwest::get(format!("{}/readyz", app.ops)).await.unwrap().status().as_u16()
}

async fn full_for_a_while(disk: Disk) {
    let database = format!("sqlite://{}?mode=rwc", disk.path().join("test.db").display());
    let (sink, ledger) = (Sink::default(), Ledger::default());
    let sink_url = sink.start().await;
    let settings = [("DATABASE_URL", &*database), ("SINK_URL", &*sink_url), ("WEBHOOK_SECRET", SECRET)];
    let mut app = start(&settings).await;
    ledger.send_to(&[&app.http]);
    let load = ledger.load(&Load { rolled_back: 5, ..Load::default() });
    eventually(Duration::from_secs(20), "ops succeed", || async { ledger.successes() > 50 }).await;
    for round in 0..3 {
        disk.fill(&app);
        let probe = || format!("probe-{:016x}", fastrand::u64(..));
        eventually(Duration::from_secs(60), "the disk is full", || async {
            send(&ledger, &app.http, &probe(), "ok").await != Answer::Ok
        })
        .await;
        eventually(Duration::from_secs(20), "not ready", || async { readiness(&app).await == 503 }).await;
        disk.free(&app);
        println!("round {round}: back after {:?}", ledger.serves_again(Duration::from_secs(20)).await);
        for (n, mode, expected) in
            [(1, "ok", Answer::Ok), (2, "status:409", Answer::No), (3, "ok", Answer::Ok), (4, "ok", Answer::Ok)]
        {
            assert_eq!(send(&ledger, &app.http, &format!("{round}-{n}"), mode).await, expected, "{round}-{n}");
        }
        eventually(Duration::from_secs(20), "ready", || async { readiness(&app).await == 200 }).await;
    }
    ledger.stop(load).await;
    let other = Outbox::connect(&database, 1).await.unwrap();
    let written = other.transaction(Context::default(), |tx, _| async move {
        tx.execute_unprepared("insert into orders (op, key) values ('other', 'direct')").await
    });
    written.await.expect("another process can write");
    assert!(app.is_running());
    app.kill().await;
    let app = start(&settings).await;
    let report = ledger.audit(&other, &sink, Duration::from_secs(60)).await;
    report.assert_clean();
    assert_eq!(texts(&other, "select op from orders where op = 'other'").await, ["other"]);
    drop(app);
}

#[tokio::test]
async fn a_full_disk_makes_no_liar_of_anybody() {
    match Disk::small() {
        Some(disk) => full_for_a_while(disk).await,
        None => println!("no small disk without root: files of a limited size alone"),
    }
    full_for_a_while(Disk::Limited(tempfile::tempdir().unwrap())).await;
}
