//! A network that loses connections without a word: nobody is told, and nothing ever comes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_seaorm::Outbox;
use outbox_test_servers::{Fault, Postgres, Proxy};
use outbox_tests::{Database, Process, binary, eventually, texts};
use reqwest::{Client, StatusCode};
use serde_json::json;
use tokio::{process::Command, task::JoinHandle};

use crate::example::start;

const LEASE: Duration = Duration::from_secs(4);

/// A worker behind a proxy, and an API beside it that reaches the database directly and goes on creating todos.
struct Far {
    proxy: Proxy,
    direct: Database,
    outbox: Outbox,
    worker: Process,
    created: Arc<AtomicUsize>,
    stopped: Arc<AtomicBool>,
    load: JoinHandle<()>,
    _api: Process,
}

impl Far {
    async fn start() -> Self {
        let server = Postgres::shared();
        let url = server.database();
        let proxy = Proxy::start(server.port()).await;
        let (direct, far) = (Database::Postgres(url.clone()), Database::Postgres(proxy.url(&url, server.port())));
        let api = start("serve", &direct, &[]).await;
        let lease = LEASE.as_millis().to_string();
        let worker = start("worker", &far, &[("OUTBOX_LEASE_MS", &lease), ("OUTBOX_POLL_MS", "200")]).await;
        let (created, stopped) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let load = tokio::spawn({
            let (http, created, stopped) = (api.http.clone(), created.clone(), stopped.clone());
            async move {
                let client = Client::new();
                while !stopped.load(Ordering::SeqCst) {
                    let todo = json!({ "title": format!("todo {}", created.load(Ordering::SeqCst)) });
                    let answer = client.post(format!("{http}/todos")).json(&todo).send().await.unwrap();
                    assert_eq!(answer.status(), StatusCode::CREATED);
                    created.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
        let outbox = direct.open().await;
        let far = Self { proxy, direct, outbox, worker, created, stopped, load, _api: api };
        eventually(Duration::from_secs(20), "deliveries flow", || async { far.delivered().await > 20 }).await;
        assert!(far.is_ready().await);
        far
    }

    async fn delivered(&self) -> usize {
        texts(&self.outbox, "select position::text from outbox_delivered").await.len()
    }

    async fn is_ready(&self) -> bool {
        let began = Instant::now();
        let answer = Client::new().get(format!("{}/readyz", self.worker.ops)).send().await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "a probe is answered soon: {:?}", began.elapsed());
        answer.status() == StatusCode::OK
    }

    /// Whether `outbox doctor` has nothing to say.
    async fn is_well(&self) -> bool {
        let doctor = Command::new(binary("outbox-cli").with_file_name("outbox"))
            .args(["doctor", "--database-url", &self.direct.url()])
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(Duration::from_secs(60), doctor).await.expect("it ends").unwrap();
        output.status.success()
    }

    async fn last_event(&self) -> i64 {
        texts(&self.outbox, "select coalesce(max(position), 0)::text from outbox_events").await[0].parse().unwrap()
    }

    /// Waits for the first delivery of an event after this one, and says how long that took.
    async fn next_delivery(&self, last: i64) -> Duration {
        let began = Instant::now();
        let newer = format!("select position::text from outbox_delivered where position > {last}");
        let delivered = || async { !texts(&self.outbox, &newer).await.is_empty() };
        eventually(Duration::from_secs(60), "deliveries flow again", delivered).await;
        began.elapsed()
    }

    /// Everything arrives, once or more, and once in what the handlers wrote.
    async fn end(mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        (&mut self.load).await.unwrap();
        let all = 2 * self.created.load(Ordering::SeqCst);
        eventually(Duration::from_secs(60), "all is delivered", || async { self.delivered().await == all }).await;
        assert_eq!(texts(&self.outbox, "select key from outbox_lanes").await, Vec::<String>::new());
        assert_eq!(texts(&self.outbox, "select error from outbox_dead_letters").await, Vec::<String>::new());
    }
}

#[tokio::test]
async fn vanished_connections_cost_no_more_than_two_leases() {
    let far = Far::start().await;
    far.proxy.swallow_existing();
    let last = far.last_event().await;
    let (back, red) = tokio::join!(far.next_delivery(last), async {
        eventually(Duration::from_secs(20), "it is not ready", || async { !far.is_ready().await }).await;
    });
    let () = red;
    println!("delivered again after {back:?}");
    assert!(back <= 2 * LEASE, "{back:?}");
    eventually(Duration::from_secs(20), "it is ready", || async { far.is_ready().await }).await;
    far.end().await;
}

#[tokio::test]
async fn a_black_hole_is_red_and_left_within_two_leases() {
    let far = Far::start().await;
    far.proxy.set(Fault::Freeze);
    // Nothing newer was routed: its delivery needs every kind of call. What has piled up meanwhile is not measured.
    let last = far.last_event().await;
    eventually(Duration::from_secs(20), "it is not ready", || async { !far.is_ready().await }).await;
    eventually(Duration::from_secs(60), "the doctor notices", || async { !far.is_well().await }).await;
    assert!(!far.is_ready().await);
    // The network is mended; what was open before stays lost.
    far.proxy.swallow_existing();
    far.proxy.set(Fault::None);
    let back = far.next_delivery(last).await;
    println!("delivered again after {back:?}");
    assert!(back <= 2 * LEASE, "{back:?}");
    eventually(Duration::from_secs(20), "it is ready", || async { far.is_ready().await }).await;
    eventually(Duration::from_secs(30), "the doctor is content", || async { far.is_well().await }).await;
    far.end().await;
}
