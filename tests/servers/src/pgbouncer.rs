use std::{
    fs,
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Instant,
};

use tempfile::TempDir;

use crate::{PATIENCE, Postgres, as_ordinary_user};

/// Keeps it as long as the standard input is open.
const WATCH: &str = r#""$@" & pooler=$!; cat >/dev/null; kill -TERM $pooler 2>/dev/null; wait"#;

/// A PgBouncer in front of a server. It gives each transaction another session, of which there are few.
#[derive(Debug)]
pub struct PgBouncer {
    directory: TempDir,
    server_port: u16,
    port: u16,
    running: Child,
}

impl PgBouncer {
    /// Starts one with so many sessions for each database.
    ///
    /// # Panics
    ///
    /// If PgBouncer is not installed and cannot be, or does not start.
    #[must_use]
    pub fn start(server: &Postgres, sessions: u32) -> Self {
        let program = pgbouncer_binary();
        let directory = tempfile::Builder::new().prefix("outbox-pgbouncer-").tempdir().expect("a temporary folder");
        // The ordinary user who runs it has to reach its settings.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("the folder is ours");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let settings = directory.path().join("pgbouncer.ini");
        let text = format!(
            "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
             default_pool_size = {sessions}\nmax_client_conn = 500\nignore_startup_parameters = extra_float_digits\n",
            server.port()
        );
        fs::write(&settings, text).expect("the folder is ours");
        let log = fs::File::create(directory.path().join("log")).expect("a log file");
        let pgbouncer = as_ordinary_user(&program);
        let running = Command::new("sh")
            .args(["-c", WATCH, "watch"])
            .arg(pgbouncer.get_program())
            .args(pgbouncer.get_args())
            .arg(&settings)
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("sh runs");
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = || fs::read_to_string(directory.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "PgBouncer did not start: {}", log());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Self { directory, server_port: server.port(), port, running }
    }

    /// Rewrites a URL of the server so that it goes through PgBouncer.
    #[must_use]
    pub fn url(&self, server_url: &str) -> String {
        server_url.replace(&format!(":{}/", self.server_port), &format!(":{}/", self.port))
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        drop(self.running.stdin.take());
        let _ = self.running.wait();
    }
}

fn pgbouncer_binary() -> PathBuf {
    crate::install("pgbouncer", || find_pgbouncer().is_some());
    find_pgbouncer().expect("these tests need PgBouncer: install it, on Debian with `apt-get install pgbouncer`")
}

fn find_pgbouncer() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin", "/usr/local/sbin", "/usr/local/bin"].map(PathBuf::from));
    folders.into_iter().map(|folder| folder.join("pgbouncer")).find(|program| program.is_file())
}
