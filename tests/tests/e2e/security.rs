//! What somebody who means no good can reach.

use std::{net::SocketAddr, time::Duration};

use outbox_tests::{
    Database, Process, TOKEN, command, eventually,
    sink::{SECRET, Sink},
};
use reqwest::{Client, StatusCode};
use sea_orm::ConnectionTrait;
use serde_json::{Value, json};
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

#[tokio::test]
async fn a_late_page_of_the_board_takes_little_memory() {
    let database = Database::sqlite();
    let url = database.url();
    let app = Process::start("conformance-app", "worker", &[("DATABASE_URL", &url)]).await;
    let outbox = database.open().await;
    // 60,000 delivered events of 2 kB: as whole rows they would take hundreds of MB.
    let fill = "with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)";
    for sql in [
        format!(
            "{fill} insert into outbox_events (position, event_id, event_type, schema_version, aggregate_type, aggregate_id, payload,
               occurred_at, recorded_at)
             select i, randomblob(16), 'OrderPlaced', 1, 'order', i, '\"' || hex(zeroblob(1000)) || '\"',
               strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), strftime('%Y-%m-%dT%H:%M:%fZ', 'now') from n"
        ),
        format!(
            "{fill} insert into outbox_delivered (subscription_id, position, attempts, delivered_at)
             select s.id, i, 1, strftime('%Y-%m-%dT%H:%M:%fZ', 'now') from n, outbox_subscriptions s where s.name = 'effects'"
        ),
    ] {
        outbox.writer().execute_unprepared(&sql).await.unwrap();
    }
    let client = Client::new();
    let page = async |page: u32| {
        let path = format!("{}/api/v1/queues/effects/tasks?status=Done&page_size=10&page={page}", app.ops);
        let answer = client.get(path).bearer_auth(TOKEN).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        answer.json::<Vec<Value>>().await.unwrap().len()
    };
    assert_eq!(page(1).await, 10);
    let before = app.most_memory();
    assert_eq!((page(1000).await, page(1001).await, page(5999).await), (10, 0, 0));
    let more = app.most_memory() - before;
    assert!(more < 50, "{more} MB");
}
