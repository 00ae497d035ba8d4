//! Private database servers for tests, started from installed binaries on free ports, and destinations that misbehave.
//!
//! A server lives as long as the test process: it watches a pipe whose other end the process holds, so it also ends
//! when the process is killed. A test that needs a server never passes without one: if the binaries are missing and
//! cannot be installed, it fails with a sentence that says what to install.

mod destination;
mod pgbouncer;
mod proxy;
mod redis;

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

pub use destination::{Destination, Manner};
pub use pgbouncer::PgBouncer;
pub use proxy::{Fault, Proxy};
pub use redis::Redis;

/// Keeps the server as long as its standard input is open, then ends it and removes its folder, unless it was stopped
/// on purpose.
const WATCH: &str = r#"directory=$1; shift; "$@" & server=$!; cat >/dev/null; kill -QUIT $server 2>/dev/null; wait; [ -e "$directory/stopped" ] || rm -rf "$directory""#;

/// How long a server may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// A PostgreSQL server, with `fsync=on`.
#[derive(Debug)]
pub struct Postgres {
    directory: PathBuf,
    binaries: PathBuf,
    settings: Vec<String>,
    port: u16,
    running: Mutex<Option<Child>>,
}

impl Postgres {
    /// The server that all tests of this process share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(|| Self::start(&["max_connections=300"]))
    }

    /// Starts a server with these settings, each `name=value`.
    ///
    /// # Panics
    ///
    /// If PostgreSQL is not installed and cannot be, or does not start.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
        let binaries = postgres_binaries();
        let directory = server_folder();
        let initdb = as_ordinary_user(&binaries.join("initdb"))
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-locale", "--no-sync", "-D"])
            .arg(directory.join("data"))
            .output()
            .expect("initdb runs");
        assert_succeeded("initdb", &initdb);
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        Self::launched(directory, binaries, settings)
    }

    /// Starts a copy of this server that follows it asynchronously and can be read. It finds this server at `port`, which
    /// may be that of a proxy.
    ///
    /// # Panics
    ///
    /// If the copy cannot be made, or does not start.
    #[must_use]
    pub fn standby(&self, port: u16) -> Self {
        let directory = server_folder();
        let data = directory.join("data");
        let copied = as_ordinary_user(&self.binaries.join("pg_basebackup"))
            .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &port.to_string()])
            .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync", "-D"])
            .arg(&data)
            .output()
            .expect("pg_basebackup runs");
        assert_succeeded("pg_basebackup", &copied);
        Self::launched(directory, self.binaries.clone(), self.settings.clone())
    }

    /// Makes a standby the primary, on a timeline of its own.
    ///
    /// # Panics
    ///
    /// If it does not become one.
    pub fn promote(&self) {
        let promoted = as_ordinary_user(&self.binaries.join("pg_ctl"))
            .args(["promote", "--wait", "-D"])
            .arg(self.directory.join("data"))
            .output()
            .expect("pg_ctl runs");
        assert_succeeded("pg_ctl promote", &promoted);
    }

    fn launched(directory: PathBuf, binaries: PathBuf, settings: Vec<String>) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let server = Self { directory, binaries, settings, port, running: Mutex::default() };
        server.launch();
        server
    }

    /// Starts the server again after [`stop`](Self::stop).
    ///
    /// # Panics
    ///
    /// If it does not answer in time.
    pub fn launch(&self) {
        let _ = fs::remove_file(self.directory.join("stopped"));
        let mut server = as_ordinary_user(&self.binaries.join("postgres"));
        server.arg("-D").arg(self.directory.join("data"));
        server.args(["-h", "127.0.0.1", "-p", &self.port.to_string(), "-k"]).arg(&self.directory);
        for setting in &self.settings {
            server.args(["-c", setting]);
        }
        let log = fs::File::create(self.directory.join("log")).expect("a log file");
        let child = Command::new("sh")
            .args(["-c", WATCH, "watch"])
            .arg(&self.directory)
            .arg(server.get_program())
            .args(server.get_args())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("sh runs");
        *self.running.lock().expect("no start panicked") = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while !self.tool("pg_isready", &["-q"]).status.success() {
            let log = || fs::read_to_string(self.directory.join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "PostgreSQL did not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Stops the server: `fast` rolls back what is open, `immediate` is a crash.
    ///
    /// # Panics
    ///
    /// If it does not stop.
    pub fn stop(&self, mode: &str) {
        fs::write(self.directory.join("stopped"), "").expect("the folder is ours");
        let stop = as_ordinary_user(&self.binaries.join("pg_ctl"))
            .args(["stop", "-m", mode, "-D"])
            .arg(self.directory.join("data"))
            .output()
            .expect("pg_ctl runs");
        assert_succeeded("pg_ctl stop", &stop);
        self.end();
    }

    /// Creates an empty database and returns its URL.
    ///
    /// # Panics
    ///
    /// If it cannot be created.
    #[must_use]
    pub fn database(&self) -> String {
        let name = format!("test_{:016x}", fastrand::u64(..));
        assert_succeeded("createdb", &self.tool("createdb", &["-T", "template0", &name]));
        format!("postgres://postgres@127.0.0.1:{}/{name}", self.port)
    }

    /// Creates a database with everything that another one has, and returns its URL. Nobody may be connected to the
    /// other one.
    ///
    /// # Panics
    ///
    /// If it cannot be created.
    #[must_use]
    pub fn copy_of(&self, url: &str) -> String {
        let name = format!("test_{:016x}", fastrand::u64(..));
        assert_succeeded("createdb", &self.tool("createdb", &["-T", database_name(url), &name]));
        format!("postgres://postgres@127.0.0.1:{}/{name}", self.port)
    }

    /// Creates a database on another server with what a dump of this one has, and returns its URL.
    ///
    /// # Panics
    ///
    /// If it cannot be dumped or restored.
    #[must_use]
    pub fn dump_into(&self, url: &str, other: &Self) -> String {
        let dump = self.directory.join("dump");
        let file = dump.to_str().expect("the folder has a name");
        assert_succeeded("pg_dump", &self.tool("pg_dump", &["-f", file, database_name(url)]));
        let restored = other.database();
        let restore = ["-q", "-v", "ON_ERROR_STOP=1", "-f", file, database_name(&restored)];
        assert_succeeded("psql", &other.tool("psql", &restore));
        restored
    }

    /// Drops a database and ends its sessions. Says nothing if that fails: the whole server goes with its process.
    pub fn discard(&self, url: &str) {
        let _ = self.tool("dropdb", &["--force", database_name(url)]);
    }

    /// The port of the server, for a proxy in front of it.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn tool(&self, name: &str, args: &[&str]) -> Output {
        Command::new(self.binaries.join(name))
            .args(["-h", "127.0.0.1", "-U", "postgres", "-p", &self.port.to_string()])
            .args(args)
            .output()
            .unwrap_or_else(|error| panic!("{name} does not run: {error}"))
    }
}

impl Postgres {
    fn end(&self) {
        if let Some(mut child) = self.running.lock().ok().and_then(|mut running| running.take()) {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.directory.join("stopped"));
        self.end();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn server_folder() -> PathBuf {
    let folder = tempfile::Builder::new().prefix("outbox-postgres-").tempdir().expect("a temporary folder").keep();
    // The ordinary user who runs the server has to reach its data.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("the folder is ours");
    folder
}

fn database_name(url: &str) -> &str {
    url.rsplit('/').next().expect("a part behind the last slash")
}

fn assert_succeeded(what: &str, output: &Output) {
    assert!(output.status.success(), "{what} failed: {}", String::from_utf8_lossy(&output.stderr));
}

/// A command that does not run as root, which PostgreSQL refuses.
fn as_ordinary_user(program: &Path) -> Command {
    let id = |args: &[&str]| Command::new("id").args(args).output().ok().filter(|output| output.status.success());
    if id(&["-u"]).is_none_or(|output| output.stdout.trim_ascii() != b"0") {
        return Command::new(program);
    }
    let user = if id(&["-u", "postgres"]).is_some() { "postgres" } else { "nobody" };
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={user}"), "--clear-groups", "--"]).arg(program);
    command
}

fn postgres_binaries() -> PathBuf {
    install("postgresql", || find_postgres_binaries().is_some());
    find_postgres_binaries().expect(
        "these tests need the PostgreSQL server binaries (initdb, postgres): install them, on Debian with `apt-get \
         install postgresql`, elsewhere so that `pg_config --bindir` finds them",
    )
}

/// Installs a package of Debian or its descendants, as root; everywhere else the sentence of the caller helps.
///
/// Tests run side by side: one installs and the others wait, since a second `apt-get` at the same time fails at once.
pub fn install(package: &str, is_there: impl Fn() -> bool) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let apt = |args: &[&str]| {
        let _ = Command::new("apt-get").args(["-o", "DPkg::Lock::Timeout=120"]).args(args).output();
    };
    let add = ["install", "-y", "--no-install-recommends", package];
    if !is_there() {
        apt(&add);
    }
    if !is_there() {
        apt(&["update"]);
        apt(&add);
    }
}

fn find_postgres_binaries() -> Option<PathBuf> {
    let configured = Command::new("pg_config").arg("--bindir").output().ok();
    let configured = configured.map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    let mut installed: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .map(|versions| versions.flatten().map(|version| version.path().join("bin")).collect())
        .unwrap_or_default();
    installed.sort();
    configured.into_iter().chain(installed.into_iter().rev()).find(|path| {
        ["initdb", "postgres", "pg_ctl", "pg_basebackup", "createdb", "pg_isready"]
            .iter()
            .all(|name| path.join(name).is_file())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_starts_crashes_and_starts_again() {
        let server = Postgres::start(&[]);
        let url = server.database();
        assert!(url.starts_with("postgres://postgres@127.0.0.1:"), "{url}");
        server.stop("immediate");
        server.launch();
        let _ = server.database();
        let directory = server.directory.clone();
        drop(server);
        assert!(!directory.exists());
    }

    #[test]
    fn a_standby_follows_and_becomes_the_primary() {
        let server = Postgres::start(&[]);
        let standby = server.standby(server.port());
        let url = server.database();
        let deadline = Instant::now() + PATIENCE;
        while !standby.tool("psql", &["-c", "select", database_name(&url)]).status.success() {
            assert!(Instant::now() < deadline, "the database did not arrive");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!standby.tool("createdb", &["other"]).status.success(), "it takes no writes");
        standby.promote();
        let _ = standby.database();
    }
}
