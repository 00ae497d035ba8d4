//! Helpers for tests that drive real processes.

pub mod ledger;
pub mod sink;

use std::{
    future::Future,
    path::{Path, PathBuf},
    process::{Command as StdCommand, ExitStatus, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use outbox_seaorm::Outbox;
use outbox_test_servers::Postgres;
use sea_orm::{ConnectionTrait, Statement};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

/// The token that started processes ask operators for.
pub const TOKEN: &str = "token-of-the-tests";

/// A program of the workspace, started with settings of the environment. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    _stdout: Lines<BufReader<ChildStdout>>,
    /// Where its API is.
    pub http: String,
    /// Where its operators' listener is.
    pub ops: String,
}

/// A database of one test.
#[derive(Debug)]
pub enum Database {
    /// A file of its own.
    Sqlite(TempDir),
    /// A database of its own on a private server.
    Postgres(String),
}

impl Database {
    /// A file in a folder that goes with the test.
    ///
    /// # Panics
    ///
    /// If there is no place for it.
    #[must_use]
    pub fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().expect("a temporary folder"))
    }

    /// A database on the server that all tests of this process share.
    #[must_use]
    pub fn postgres() -> Self {
        Self::Postgres(Postgres::shared().database())
    }

    /// What goes into `DATABASE_URL`.
    #[must_use]
    pub fn url(&self) -> String {
        match self {
            Self::Sqlite(directory) => format!("sqlite://{}?mode=rwc", directory.path().join("test.db").display()),
            Self::Postgres(url) => url.clone(),
        }
    }

    /// Connections of the test itself.
    ///
    /// # Panics
    ///
    /// If the database does not answer.
    pub async fn open(&self) -> Outbox {
        Outbox::connect(&self.url(), 4).await.expect("the database opens")
    }
}

/// The first column of all rows, as text, sorted.
///
/// # Panics
///
/// If the query fails.
pub async fn texts(outbox: &Outbox, sql: &str) -> Vec<String> {
    let db = outbox.reader();
    let statement = Statement::from_string(db.get_database_backend(), sql);
    let rows = db.query_all_raw(statement).await.expect("the query runs");
    let mut texts: Vec<String> = rows.iter().map(|row| row.try_get_by_index(0).expect("a text")).collect();
    texts.sort_unstable();
    texts
}

/// Builds a binary of the workspace once and returns its path: `cargo test` alone does not.
///
/// # Panics
///
/// If it does not build.
pub fn binary(package: &'static str) -> PathBuf {
    static BUILT: OnceLock<std::sync::Mutex<Vec<&'static str>>> = OnceLock::new();
    let exe = std::env::current_exe().expect("the test has a path");
    let profile = exe.parent().and_then(|deps| deps.parent()).expect("tests are in target/PROFILE/deps");
    let mut built = BUILT.get_or_init(Default::default).lock().expect("no build panicked");
    // `scripts/test` has built all of them, with the features of the whole workspace.
    if !built.contains(&package) && std::env::var_os("OUTBOX_BINARIES_BUILT").is_none() {
        let status = StdCommand::new(env!("CARGO"))
            .args(["build", "--quiet", "--package", package, "--target-dir"])
            .arg(profile.parent().expect("target/PROFILE"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .expect("cargo runs");
        assert!(status.success(), "{package} does not build");
        built.push(package);
    }
    profile.join(package)
}

/// A command that sees nothing of this process' settings.
#[must_use]
pub fn command(package: &'static str, mode: &str, settings: &[(&str, &str)]) -> Command {
    let mut command = Command::new(binary(package));
    command.arg(mode).env_clear().env("OPS_TOKEN", TOKEN).env("RUST_LOG", "warn");
    command.env("HTTP_ADDR", "127.0.0.1:0").env("OPS_ADDR", "127.0.0.1:0");
    command.envs(settings.iter().copied()).stdin(Stdio::null()).kill_on_drop(true);
    command
}

impl Process {
    /// Starts a program and waits for its `listening` line.
    ///
    /// # Panics
    ///
    /// If the line does not come within 20 s.
    pub async fn start(package: &'static str, mode: &str, settings: &[(&str, &str)]) -> Self {
        Self::started(command(package, mode, settings)).await
    }

    /// As [`start`](Self::start), with the log in a file.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start), or if there is no place for the file.
    pub async fn start_with_log(package: &'static str, mode: &str, settings: &[(&str, &str)], log: &Path) -> Self {
        let mut command = command(package, mode, settings);
        command.stderr(std::fs::File::create(log).expect("a place for the log"));
        Self::started(command).await
    }

    /// As [`start`](Self::start), from a [`command`] with changes.
    ///
    /// # Panics
    ///
    /// As [`start`](Self::start).
    pub async fn started(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let listening = async {
            loop {
                let line =
                    lines.next_line().await.expect("stdout can be read").expect("the program prints where it is");
                if let Some(addresses) = line.strip_prefix("listening http=") {
                    return addresses.to_owned();
                }
            }
        };
        let addresses = tokio::time::timeout(Duration::from_secs(20), listening).await.expect("a listening line");
        let (http, ops) = addresses.split_once(" ops=").expect("both addresses");
        let (http, ops) = (format!("http://{http}"), format!("http://{ops}"));
        Self { child, _stdout: lines, http, ops }
    }

    /// kill -9, and waits for the end.
    ///
    /// # Panics
    ///
    /// If the process cannot be killed.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("the process can be killed");
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Panics
    ///
    /// If it does not end within `limit`.
    pub async fn terminate(mut self, limit: Duration) -> (ExitStatus, Duration) {
        let started = Instant::now();
        self.signal("TERM");
        let status = tokio::time::timeout(limit, self.child.wait()).await;
        (status.expect("the process ends in time").expect("it can be waited for"), started.elapsed())
    }

    /// Whether the process is still there.
    ///
    /// # Panics
    ///
    /// If the system does not know.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("the state of a child is known").is_none()
    }

    /// What the system calls it.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id().expect("the process runs")
    }

    /// The most memory that it has had so far, in MB.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    #[must_use]
    pub fn most_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).expect("a system with /proc");
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        most.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).expect("a number of kB") / 1024
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`.
    ///
    /// # Panics
    ///
    /// If the process has ended.
    pub fn signal(&self, name: &str) {
        let pid = self.id().to_string();
        let status = StdCommand::new("kill").args([&format!("-{name}"), &pid]).status().expect("kill runs");
        assert!(status.success(), "kill -{name} {pid}");
    }
}

/// Waits until `condition` holds, looking every 10 ms.
///
/// # Panics
///
/// If it does not hold within `limit`.
pub async fn eventually<F, Fut>(limit: Duration, what: &str, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The code of the documents: `cargo test --doc` compiles it, and runs what can run.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../../README.md")]
    mod readme {}

    #[doc = include_str!("../../docs/guide.md")]
    mod guide {}

    #[doc = include_str!("../../docs/configuration.md")]
    mod configuration {}

    #[doc = include_str!("../../docs/scaling.md")]
    mod scaling {}
}
