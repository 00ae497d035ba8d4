use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use outbox_apalis::{InvalidWebhook, WebhookPublisher};
use outbox_core::{Delivery, Publisher as _, RecordedEvent};
use uuid::Uuid;

use crate::{
    fixture::{Received, Receiver, SECRET, event, failure, publish, publisher},
    standard_webhooks::verified,
};

fn body(received: &Received) -> &str {
    std::str::from_utf8(&received.body).unwrap()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn timestamp(received: &Received) -> u64 {
    received.headers["webhook-timestamp"].to_str().unwrap().parse().unwrap()
}

#[tokio::test]
async fn the_body_is_a_cloud_event_with_all_that_is_known() {
    let receiver = Receiver::accepting().await;
    let publisher = publisher(&receiver.url()).source("https://shop.example.com").unwrap();
    let known = RecordedEvent {
        tenant: Some("acme".to_owned()),
        correlation_id: Some("c-1".to_owned()),
        causation_id: Some("e-0".to_owned()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
        tracestate: Some("a=b".to_owned()),
        ..event()
    };
    publish(&publisher, known).await.unwrap();
    let expected = concat!(
        r#"{"id":"01980000-0000-7000-8000-000000000001","source":"https://shop.example.com","specversion":"1.0","#,
        r#""type":"order.placed","subject":"17","time":"2026-01-02T03:04:05.678Z","datacontenttype":"application/json","#,
        r#""dataschemaversion":2,"aggregatetype":"order","tenant":"acme","correlationid":"c-1","causationid":"e-0","#,
        r#""traceparent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","tracestate":"a=b","#,
        r#""data":{"total":1}}"#
    );
    assert_eq!(body(&receiver.only()), expected);
}

#[tokio::test]
async fn the_headers_are_those_of_standard_webhooks_and_no_others() {
    let receiver = Receiver::accepting().await;
    let before = now();
    publish(&publisher(&format!("{}?a=1&b=%20#fragment", receiver.url())), event()).await.unwrap();
    let received = receiver.only();
    assert_eq!((received.method.as_str(), received.uri.to_string().as_str()), ("POST", "/hook?a=1&b=%20"));
    let mut names: Vec<&str> = received.headers.keys().map(|name| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "content-length",
            "content-type",
            "host",
            "user-agent",
            "webhook-id",
            "webhook-signature",
            "webhook-timestamp"
        ]
    );
    assert_eq!(received.headers["content-type"], "application/cloudevents+json; charset=utf-8");
    assert_eq!(received.headers["host"], receiver.address.to_string());
    assert_eq!(received.headers["user-agent"], concat!("outbox/", env!("CARGO_PKG_VERSION")));
    assert_eq!(received.headers["webhook-id"], "01980000-0000-7000-8000-000000000001");
    assert!((before..=now()).contains(&timestamp(&received)), "{received:?}");
}

#[tokio::test]
async fn the_payload_arrives_byte_for_byte() {
    let receiver = Receiver::accepting().await;
    let payload = r#"{"zero":"\u0000","big":9007199254740993,"twice":1, "twice":2,"e":1.50E+2,"s":"\u00fc\/ü","n":{}}"#;
    publish(&publisher(&receiver.url()), RecordedEvent { payload: payload.to_owned(), ..event() }).await.unwrap();
    assert!(body(&receiver.only()).ends_with(&format!(",\"data\":{payload}}}")), "{}", body(&receiver.only()));
}

#[tokio::test]
async fn a_megabyte_of_payload_arrives_and_verifies() {
    let receiver = Receiver::accepting().await;
    let payload = format!("\"{}\"", "ü".repeat(512 * 1024));
    publish(&publisher(&receiver.url()), RecordedEvent { payload: payload.clone(), ..event() }).await.unwrap();
    let received = receiver.only();
    assert!(body(&received).ends_with(&format!("{payload}}}")));
    assert_eq!(verified(&[(&received, SECRET)]), [true]);
}

#[tokio::test]
async fn signatures_verify_with_the_official_package() {
    let receiver = Receiver::accepting().await;
    let publisher = publisher(&receiver.url());
    publish(&publisher, event()).await.unwrap();
    let other = RecordedEvent { id: Uuid::now_v7(), payload: r#""ü \u0000""#.to_owned(), ..event() };
    publish(&publisher, other).await.unwrap();
    let received = receiver.received();
    let mut other_body = received[0].clone();
    other_body.body = body(&received[0]).replace("17", "18").into();
    let mut other_id = received[0].clone();
    other_id.headers.insert("webhook-id", "01980000-0000-7000-8000-000000000002".parse().unwrap());
    let mut other_time = received[0].clone();
    other_time.headers.insert("webhook-timestamp", (timestamp(&received[0]) - 1).into());
    let cases = [&received[0], &received[1], &other_body, &other_id, &other_time].map(|received| (received, SECRET));
    assert_eq!(verified(&cases), [true, true, false, false, false]);
}

#[tokio::test]
async fn during_a_rotation_each_secret_verifies_alone() {
    let [second, third, foreign] =
        [24, 64, 32].map(|bytes| format!("whsec_{}", STANDARD.encode(vec![bytes as u8; bytes])));
    let receiver = Receiver::accepting().await;
    let publisher = publisher(&receiver.url()).also_sign_with(&second).unwrap().also_sign_with(&third).unwrap();
    publish(&publisher, event()).await.unwrap();
    let received = receiver.only();
    let signatures: Vec<&str> = received.headers["webhook-signature"].to_str().unwrap().split(' ').collect();
    assert!(signatures.len() == 3 && signatures.iter().all(|one| one.starts_with("v1,")), "{signatures:?}");
    let cases = [SECRET, &second, &third, &foreign].map(|secret| (&received, secret));
    assert_eq!(verified(&cases), [true, true, true, false]);
}

#[tokio::test]
async fn each_attempt_has_the_same_id_and_a_fresh_timestamp() {
    let receiver = Receiver::answering(503, &[]).await;
    let publisher = publisher(&receiver.url());
    let begun = now();
    failure(&publisher).await;
    let between = now();
    failure(&publisher).await;
    let received = receiver.received();
    assert_eq!(received[0].headers["webhook-id"], received[1].headers["webhook-id"]);
    assert_eq!(received[0].body, received[1].body);
    assert!((begun..=between).contains(&timestamp(&received[0])));
    assert!((between..=now()).contains(&timestamp(&received[1])));
}

#[tokio::test]
async fn a_payload_that_is_not_json_is_never_sent() {
    let receiver = Receiver::accepting().await;
    let broken = RecordedEvent { payload: "{".to_owned(), ..event() };
    let error = publish(&publisher(&receiver.url()), broken).await.unwrap_err();
    assert!(error.is_permanent(), "{error}");
    assert!(receiver.received().is_empty());
}

#[test]
fn settings_that_cannot_work_are_refused_where_they_are_given() {
    let refused = |url: &str| WebhookPublisher::new(url, SECRET).expect_err(url);
    for none in ["", "example.com/hook", "http://", "https://a b/", "http://[::1", "http://1.2.3.4.5/"] {
        assert!(matches!(refused(none), InvalidWebhook::Url(_)), "{none}");
    }
    for scheme in ["ftp://example.com", "file:///etc/passwd", "ws://example.com", "unix:/run/x", "javascript:1"] {
        assert!(matches!(refused(scheme), InvalidWebhook::Scheme), "{scheme}");
    }
    for userinfo in ["https://user@example.com", "https://user:s3cret@example.com", "https://:s3cret@example.com"] {
        assert!(matches!(refused(userinfo), InvalidWebhook::Userinfo), "{userinfo}");
    }
    let url = "https://example.com/hook";
    assert!(matches!(WebhookPublisher::new(url, "whsec_c2hvcnQ=").unwrap_err(), InvalidWebhook::Secret(_)));
    let publisher = || WebhookPublisher::new(url, SECRET).unwrap();
    assert!(matches!(publisher().also_sign_with("s3cret").unwrap_err(), InvalidWebhook::Secret(_)));
    assert!(matches!(publisher().source("").unwrap_err(), InvalidWebhook::Source(_)));
    assert!(matches!(publisher().allow("10.0.0.7/8").unwrap_err(), InvalidWebhook::Network(_)));
    assert!(matches!(publisher().trust("no certificate").unwrap_err(), InvalidWebhook::Certificate(None)));
    let zero = std::time::Duration::ZERO;
    assert!(matches!(publisher().timeout(zero).unwrap_err(), InvalidWebhook::Timeout));
    assert!(matches!(publisher().connect_timeout(zero).unwrap_err(), InvalidWebhook::Timeout));
}

/// The database says what time it is, not this machine.
#[tokio::test]
async fn the_timestamp_is_when_the_attempt_began() {
    let receiver = Receiver::accepting().await;
    let delivery = Delivery::new(Arc::new(event()), "webhook".into(), 1);
    let delivery = delivery.starting_at("2001-02-03T04:05:06.789Z".parse().unwrap());
    publisher(&receiver.url()).publish(&delivery).await.unwrap();
    assert_eq!(timestamp(&receiver.only()), 981_173_106);
}
