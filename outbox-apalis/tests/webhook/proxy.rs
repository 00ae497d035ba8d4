use std::sync::{Arc, Mutex};

use outbox_apalis::{InvalidWebhook, WebhookPublisher};
use outbox_core::Reason;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    fixture::{Receiver, SECRET, event, failure, publish, publisher, raw},
    tls,
};

/// A proxy that tunnels, and what it was asked. With an answer it refuses.
struct Proxy {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    async fn start(refusal: Option<&'static str>) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = asked.clone();
        let address = raw(move |client| tunnel(client, all.clone(), refusal)).await;
        Self { url: format!("http://us%40er:p%3Ass%2Bword@{address}"), asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn tunnel(mut client: TcpStream, asked: Arc<Mutex<Vec<String>>>, refusal: Option<&'static str>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let Ok(byte) = client.read_u8().await else { return };
        head.push(byte);
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.split(' ').nth(1).unwrap().to_owned();
    asked.lock().unwrap().push(head);
    if let Some(refusal) = refusal {
        let _ = client.write_all(refusal.as_bytes()).await;
        return;
    }
    let mut server = TcpStream::connect(&target).await.unwrap();
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
}

fn through(proxy: &Proxy, url: &str) -> WebhookPublisher {
    publisher(url).trust(tls::AUTHORITY).unwrap().proxy(&proxy.url).unwrap()
}

fn assert_quiet(text: &str) {
    for secret in ["us@er", "us%40er", "p:ss+word", "p%3Ass%2Bword", "dXNAZXI6cDpzcyt3b3Jk"] {
        assert!(!text.contains(secret), "{secret:?} is in {text:?}");
    }
}

#[tokio::test]
async fn deliveries_go_through_the_proxy_that_was_given() {
    let (receiver, port) = (Receiver::accepting().await, tls::receiver().await);
    for (url, target) in [
        (receiver.url(), receiver.address.to_string()),
        (format!("https://localhost:{port}/hook"), format!("localhost:{port}")),
    ] {
        let proxy = Proxy::start(None).await;
        let publisher = through(&proxy, &url);
        publish(&publisher, event()).await.unwrap();
        let asked = proxy.asked();
        assert_eq!(asked.len(), 1, "{asked:?}");
        assert!(asked[0].starts_with(&format!("CONNECT {target} HTTP/1.1\r\n")), "{asked:?}");
        // us@er:p:ss+word
        assert!(asked[0].contains("Proxy-Authorization: Basic dXNAZXI6cDpzcyt3b3Jk\r\n"), "{asked:?}");
        assert!(!asked[0].contains("hook"), "the proxy sees no path: {asked:?}");
        assert_quiet(&format!("{publisher:?}"));
    }
    let request = receiver.only();
    assert_eq!((request.uri.to_string().as_str(), request.headers.get("proxy-authorization")), ("/hook", None));
}

#[tokio::test]
async fn a_port_that_is_not_named_is_that_of_the_scheme() {
    for (url, target) in
        [("http://example.com/hook", "example.com:80"), ("https://example.com/hook", "example.com:443")]
    {
        let proxy = Proxy::start(Some("HTTP/1.1 403 No\r\n\r\n")).await;
        failure(&through(&proxy, url)).await;
        assert!(proxy.asked()[0].starts_with(&format!("CONNECT {target} ")), "{:?}", proxy.asked());
    }
}

#[tokio::test]
async fn a_proxy_that_refuses_is_named_without_its_password() {
    let refusals = ["HTTP/1.1 407 Who are you\r\n\r\n", "HTTP/1.1 403 No\r\n\r\n", "garbage\r\n\r\n", ""];
    for (refusal, expected) in refusals.into_iter().zip(["proxy authorization required", "unsuccessful", "", ""]) {
        let proxy = Proxy::start(Some(refusal)).await;
        let error = failure(&through(&proxy, "https://example.com/hook")).await;
        assert_eq!(error.reason(), Reason::Unreachable, "{error}");
        let address = proxy.url.rsplit('@').next().unwrap();
        let start = format!("no connection to https://example.com through the proxy {address}: ");
        assert!(error.message().starts_with(&start) && error.message().contains(expected), "{error}");
        assert_quiet(error.message());
    }
}

#[tokio::test]
async fn addresses_that_are_written_out_are_checked_with_a_proxy_too() {
    let proxy = Proxy::start(None).await;
    for host in ["10.0.0.1", "169.254.169.254", "[::1]", "localhost", "LOCALHOST.", "a.localhost", "127.0.0.1"] {
        let publisher = WebhookPublisher::new(&format!("http://{host}/hook"), SECRET).unwrap();
        let error = failure(&publisher.proxy(&proxy.url).unwrap()).await;
        assert!(error.message().contains("is not public"), "{error}");
    }
    assert_eq!(proxy.asked(), Vec::<String>::new());
}

#[test]
fn what_is_no_proxy_is_refused_and_not_shown() {
    for url in [
        "",
        "proxy:3128",
        "https://us%40er:p%3Ass%2Bword@proxy",
        "socks5://us%40er:p%3Ass%2Bword@proxy",
        "http://",
        "http://proxy/path",
        "http://us%40er:p%3Ass%2Bword@exa mple",
    ] {
        let error = publisher("http://example.com").proxy(url).unwrap_err();
        assert!(matches!(error, InvalidWebhook::Proxy), "{url}");
        assert_quiet(&format!("{error} {error:?}"));
    }
}
