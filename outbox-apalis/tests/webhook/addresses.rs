use outbox_apalis::WebhookPublisher;

use crate::fixture::{Receiver, SECRET, event, failure, publish};

fn strict(url: &str) -> WebhookPublisher {
    WebhookPublisher::new(url, SECRET).unwrap()
}

#[tokio::test]
async fn this_machine_is_not_reached_by_any_spelling() {
    let receiver = Receiver::accepting().await;
    let port = receiver.address.port();
    for host in [
        "127.0.0.1",
        "127.0.0.1.",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "%31%32%37.0.0.1",
        "１２７.0.0.1",
        "localhost",
        "LOCALHOST",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "0.0.0.0",
        "0",
        "[::]",
    ] {
        let error = failure(&strict(&format!("http://{host}:{port}/hook"))).await;
        assert!(error.message().contains(" is not public; allow it with `.allow"), "{host}: {error}");
        assert!(!error.is_permanent(), "{host} may be a mistake of this worker");
    }
    assert!(receiver.received().is_empty());
}

#[tokio::test]
async fn the_refusal_names_the_address_and_the_remedy() {
    for (url, cause) in [
        (
            "http://10.0.0.1/",
            "no connection to http://10.0.0.1: address 10.0.0.1 is not public; allow it with `.allow(\"10.0.0.1\")`",
        ),
        (
            "https://169.254.169.254/latest?x=1",
            "no connection to https://169.254.169.254: address 169.254.169.254 is not public; allow it with `.allow(\"169.254.169.254\")`",
        ),
        (
            "http://[::ffff:192.168.0.1]:81/",
            "no connection to http://[::ffff:c0a8:1]:81: address 192.168.0.1 is not public; allow it with `.allow(\"192.168.0.1\")`",
        ),
        (
            "http://[fd00::1]/",
            "no connection to http://[fd00::1]: address fd00::1 is not public; allow it with `.allow(\"fd00::1\")`",
        ),
        (
            "http://[::1]/",
            "no connection to http://[::1]: address ::1 is not public; allow it with `.allow_loopback()`",
        ),
    ] {
        assert_eq!(failure(&strict(url)).await.message(), cause);
    }
}

#[tokio::test]
async fn what_was_allowed_is_reached() {
    let receiver = Receiver::accepting().await;
    let named = format!("http://localhost:{}/hook", receiver.address.port());
    for publisher in [
        strict(&receiver.url()).allow_loopback(),
        strict(&receiver.url()).allow("127.0.0.1").unwrap(),
        strict(&receiver.url()).allow("127.0.0.0/8").unwrap(),
        strict(&named).allow_loopback(),
        strict(&named).allow("127.0.0.1").unwrap(),
    ] {
        publish(&publisher, event()).await.unwrap();
    }
    assert_eq!(receiver.received().len(), 5);
    failure(&strict(&receiver.url()).allow("10.0.0.0/8").unwrap()).await;
    assert_eq!(receiver.received().len(), 5);
}
