//! What somebody who means no good can reach.

use std::{net::SocketAddr, time::Duration};

use outbox_tests::{
    Database, Process, command, eventually,
    sink::{SECRET, Sink},
};
use reqwest::{Client, StatusCode};
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream, process::Command};

/// A program that may open 1,024 files, as is common.
async fn with_few_files(package: &'static str, settings: &[(&str, &str)]) -> Process {
    let plain = command(package, "all", settings);
    let mut limited = Command::new("/bin/sh");
    limited.args(["-c", "ulimit -n 1024 && exec \"$0\" \"$@\""]).arg(plain.as_std().get_program());
    limited.args(plain.as_std().get_args()).env_clear();
    for (name, value) in plain.as_std().get_envs() {
        limited.env(name, value.expect("nothing is removed"));
    }
    Process::started(limited).await
}

async fn half_open(url: &str, sockets: usize) -> Vec<TcpStream> {
    let address: SocketAddr = url.strip_prefix("http://").unwrap().parse().unwrap();
    let mut open = Vec::with_capacity(sockets);
    for _ in 0..sockets {
        let mut stream = TcpStream::connect(address).await.expect("the system takes the connection");
        stream.write_all(b"POST /op HTTP/1.1\r\nhost: x\r\ncontent-le").await.expect("it can be sent");
        open.push(stream);
    }
    open
}

#[tokio::test]
async fn half_open_sockets_stop_neither_api_nor_webhooks() {
    let (database, sink) = (Database::sqlite(), Sink::default());
    let url = sink.start().await;
    let settings = [("DATABASE_URL", &*database.url()), ("SINK_URL", &*url), ("WEBHOOK_SECRET", SECRET)];
    let app = with_few_files("conformance-app", &settings).await;
    // The second thousand finds the places of the first taken, and both listeners are under attack.
    let mut open = half_open(&app.http, 1000).await;
    open.extend(half_open(&app.ops, 1000).await);
    let client = Client::builder().timeout(Duration::from_secs(20)).build().unwrap();
    for path in ["healthz", "readyz"] {
        let answer = client.get(format!("{}/{path}", app.ops)).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
    }
    for n in 0..5 {
        let op = json!({"op": format!("op-{n}"), "key": format!("k{n}"), "n": 1, "mode": "ok"});
        let answer = client.post(format!("{}/op", app.http)).json(&op).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::CREATED);
    }
    eventually(Duration::from_secs(20), "all events arrive", || async { sink.first_arrivals().len() == 5 }).await;
    let (status, _) = app.terminate(Duration::from_secs(20)).await;
    assert!(status.success(), "{status}");
    drop(open);
}
