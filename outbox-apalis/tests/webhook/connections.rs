use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::fixture::{MS, Receiver, event, failure, in_child, publish, publisher, raw};

#[tokio::test]
async fn a_refused_connection_is_tried_again() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = failure(&publisher(&format!("http://{address}/hook"))).await;
    assert_eq!(error.message(), format!("no connection to http://{address}: connection refused"));
    assert!(!error.is_permanent());
}

#[tokio::test]
async fn a_destination_that_never_answers_times_out() {
    let address = raw(|connection| async {
        std::future::pending::<()>().await;
        drop(connection);
    })
    .await;
    let started = Instant::now();
    let error = failure(&publisher(&format!("http://{address}")).timeout(200 * MS).unwrap()).await;
    assert_eq!((error.message(), error.is_permanent()), ("timed out after 0.2 s", false));
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_connect_timeout_includes_the_tls_handshake() {
    let address = raw(|connection| async {
        std::future::pending::<()>().await;
        drop(connection);
    })
    .await;
    let publisher = publisher(&format!("https://{address}")).connect_timeout(200 * MS).unwrap();
    let error = failure(&publisher).await;
    assert_eq!(error.message(), format!("no connection to https://{address}: timed out after 0.2 s"));
    assert!(!error.is_permanent());
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_tried_again() {
    let error = failure(&publisher("http://does-not-exist.invalid/").timeout(Duration::from_secs(5)).unwrap()).await;
    assert!(!error.is_permanent());
    let expected = "no connection to http://does-not-exist.invalid: the name was not resolved: ";
    assert!(error.message().starts_with(expected), "{error}");
}

#[tokio::test]
async fn a_connection_is_used_again() {
    for receiver in [Receiver::accepting().await, Receiver::start(|_| "fine").await] {
        let publisher = publisher(&receiver.url());
        for _ in 0..5 {
            publish(&publisher, event()).await.unwrap();
            // The connection task has to see the end of the answer.
            tokio::time::sleep(5 * MS).await;
        }
        let connections: HashSet<_> = receiver.received().iter().map(|received| received.from).collect();
        assert_eq!(connections.len(), 1, "{connections:?}");
    }
}

/// It closes or resets the connection when it is used again, without an answer.
#[tokio::test]
async fn a_used_connection_that_breaks_is_no_failure() {
    for reset in [false, true] {
        let requests = Arc::new(AtomicUsize::new(0));
        let count = requests.clone();
        let address = raw(move |mut connection| {
            let count = count.clone();
            async move {
                let _ = connection.read(&mut [0; 4096]).await;
                count.fetch_add(1, SeqCst);
                let _ = connection.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
                let _ = connection.read(&mut [0; 4096]).await;
                if reset {
                    let _ = connection.set_zero_linger();
                }
            }
        })
        .await;
        let publisher = publisher(&format!("http://{address}"));
        for n in 1..=5 {
            publish(&publisher, event()).await.unwrap();
            assert_eq!(requests.load(SeqCst), n, "each is answered once");
            // The connection task has to see the end of the answer.
            tokio::time::sleep(5 * MS).await;
        }
    }
}

/// Nobody knows whether what broke a new one would not break the next.
#[tokio::test]
async fn a_new_connection_that_breaks_is_a_failure() {
    let connections = Arc::new(AtomicUsize::new(0));
    let count = connections.clone();
    let address = raw(move |mut connection| {
        count.fetch_add(1, SeqCst);
        async move {
            let _ = connection.read(&mut [0; 4096]).await;
        }
    })
    .await;
    let error = failure(&publisher(&format!("http://{address}"))).await;
    assert!(error.message().starts_with("no answer from http://"), "{error}");
    assert_eq!(connections.load(SeqCst), 1);
}

#[tokio::test]
async fn proxies_of_the_environment_are_not_used() {
    let nowhere = "http://127.0.0.1:1";
    let names = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
    if in_child("connections::proxies_of_the_environment_are_not_used", &names.map(|name| (name, nowhere))) {
        let receiver = Receiver::accepting().await;
        publish(&publisher(&receiver.url()), event()).await.unwrap();
        receiver.only();
    }
}
