//! Destinations that are slow, endless or mad, beside one that is well.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use outbox_apalis::WebhookPublisher;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::fixture::{Fixture, MS, noted, policy, run, subscription, within};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const CONCURRENCY: usize = 5;

#[derive(Clone, Copy, Debug)]
enum Manner {
    Good,
    /// Accepts and never answers.
    Silent,
    /// Sends a byte now and then.
    Dripping,
    /// Refuses with an answer of 100 MB.
    Endless,
    /// Redirects to itself.
    Circular,
}

/// How many connections are open, and were open at most.
#[derive(Clone, Debug, Default)]
struct Open(Arc<AtomicUsize>, Arc<AtomicUsize>);

async fn serve(manner: Manner) -> (String, Open) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hook", listener.local_addr().unwrap());
    let open = Open::default();
    let counted = open.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let open = counted.clone();
            tokio::spawn(async move {
                let now = open.0.fetch_add(1, SeqCst) + 1;
                open.1.fetch_max(now, SeqCst);
                // The client may go at any time.
                let _ = answer(stream, manner).await;
                open.0.fetch_sub(1, SeqCst);
            });
        }
    });
    (url, open)
}

async fn answer(mut stream: TcpStream, manner: Manner) -> std::io::Result<()> {
    let mut request = vec![0; 64 * 1024];
    loop {
        if stream.read(&mut request).await? == 0 {
            return Ok(());
        }
        match manner {
            Manner::Good => stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await?,
            Manner::Silent => while stream.read(&mut request).await? > 0 {},
            Manner::Dripping => {
                stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
                loop {
                    stream.write_all(b"x").await?;
                    tokio::time::sleep(100 * MS).await;
                }
            }
            Manner::Endless => {
                stream.write_all(b"HTTP/1.1 500 No\r\ncontent-length: 104857600\r\n\r\n").await?;
                for _ in 0..1600 {
                    stream.write_all(&[b'x'; 65536]).await?;
                }
            }
            Manner::Circular => {
                stream.write_all(b"HTTP/1.1 302 Found\r\nlocation: /hook\r\ncontent-length: 0\r\n\r\n").await?;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destinations_that_misbehave_take_nothing_from_one_that_does_not() {
    let fixture = Fixture::new().await;
    let manners = [Manner::Silent, Manner::Dripping, Manner::Endless, Manner::Circular, Manner::Good];
    let mut worker = fixture.worker().concurrency(CONCURRENCY).unwrap();
    let mut open = Vec::new();
    for manner in manners {
        let (url, connections) = serve(manner).await;
        let publisher = WebhookPublisher::new(&url, SECRET).unwrap().allow_loopback().timeout(300 * MS).unwrap();
        let name = format!("{manner:?}").to_lowercase();
        worker = worker.publisher(subscription(&name).retry(policy(3)), publisher);
        open.push((manner, connections));
    }
    let worker = run(worker).await;
    fixture.push((0..200).map(|n| noted(&n.to_string(), n))).await;
    let good = "outbox_delivered d join outbox_subscriptions s on s.id = d.subscription_id where s.name = 'good'";
    within(Duration::from_secs(20), "the good one has all", || async { fixture.count(good).await == 200 }).await;
    // The others are still at it, or have been told to wait; a redirect is a failure for good.
    let waiting: Vec<(String, i64)> = fixture
        .rows("select s.name, count(*) from outbox_deliveries d join outbox_subscriptions s on s.id = d.subscription_id group by 1")
        .await
        .iter()
        .map(|row| (row.try_get_by_index(0).unwrap(), row.try_get_by_index(1).unwrap()))
        .collect();
    assert!(waiting.iter().any(|(name, left)| name == "silent" && *left > 100), "{waiting:?}");
    assert!(waiting.iter().any(|(name, left)| name == "dripping" && *left > 100), "{waiting:?}");
    for (manner, open) in open {
        assert!(open.1.load(SeqCst) <= 2 * CONCURRENCY, "{manner:?}: {open:?}");
    }
    worker.stop().await;
    assert_eq!(fixture.count("outbox_lanes where leased_by is not null").await, 0);
}
