use std::{
    fs,
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Keeps the server as long as its standard input is open, then kills it.
const WATCH: &str = r#""$@" & server=$!; cat >/dev/null; kill -9 $server 2>/dev/null; wait"#;

/// A Redis server without persistence.
#[derive(Debug)]
pub struct Redis {
    directory: TempDir,
    settings: Vec<String>,
    port: u16,
    running: Mutex<Option<Child>>,
}

impl Redis {
    /// Starts a server with these settings, each `name value`.
    ///
    /// # Panics
    ///
    /// If Redis is not installed and cannot be, or does not start.
    #[must_use]
    pub fn start(settings: &[&str]) -> Self {
        install();
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port").port();
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let directory = tempfile::tempdir().expect("a temporary folder");
        let server = Self { directory, settings, port, running: Mutex::default() };
        server.launch();
        server
    }

    /// Starts the server again after [`stop`](Self::stop), empty.
    ///
    /// # Panics
    ///
    /// If it does not answer in time.
    pub fn launch(&self) {
        let log = fs::File::create(self.directory.path().join("log")).expect("a log file");
        let mut server = Command::new("sh");
        server.args(["-c", WATCH, "watch", "redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        server.args(["--port", &self.port.to_string(), "--dir"]).arg(self.directory.path());
        for setting in &self.settings {
            let (name, value) = setting.split_once(' ').expect("a name and a value");
            server.args([&format!("--{name}"), value]);
        }
        let child = server.stdin(Stdio::piped()).stdout(log).stderr(Stdio::null()).spawn().expect("sh runs");
        *self.running.lock().expect("no start panicked") = Some(child);
        let deadline = Instant::now() + PATIENCE;
        while self.command(&["PING"]) != "PONG" {
            let log = || fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            assert!(Instant::now() < deadline, "Redis did not start: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills the server and all that it holds.
    pub fn stop(&self) {
        if let Some(mut child) = self.running.lock().ok().and_then(|mut running| running.take()) {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }

    /// Runs one command and returns what `redis-cli` prints.
    ///
    /// # Panics
    ///
    /// If `redis-cli` does not run.
    pub fn command(&self, args: &[&str]) -> String {
        let output = Command::new("timeout")
            .args(["3", "redis-cli", "-h", "127.0.0.1", "-p", &self.port.to_string()])
            .args(args)
            .output()
            .expect("redis-cli runs");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Where the server is.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The port of the server, for a proxy in front of it.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.stop();
    }
}

fn install() {
    let runs = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let is_there = || runs("redis-server") && runs("redis-cli");
    crate::install("redis-server", is_there);
    assert!(
        is_there(),
        "these tests need redis-server and redis-cli in the PATH: install them, on Debian with `apt-get install redis-server`"
    );
}
