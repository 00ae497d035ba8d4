use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use tokio::net::TcpListener;

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
