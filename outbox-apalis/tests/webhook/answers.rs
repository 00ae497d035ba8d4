use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use outbox_core::{Delivery, Publisher as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};

use crate::fixture::{MS, Receiver, event, failure, publish, publisher, raw};

#[tokio::test]
async fn every_2xx_is_delivered() {
    for status in [200, 201, 202, 204, 299] {
        let receiver = Receiver::answering(status, &[]).await;
        publish(&publisher(&receiver.url()), event()).await.unwrap();
        receiver.only();
    }
}

#[tokio::test]
async fn an_overloaded_or_broken_destination_is_tried_again() {
    for status in [408, 425, 429, 500, 501, 502, 503, 504, 520, 599] {
        let receiver = Receiver::answering(status, &[]).await;
        let error = failure(&publisher(&receiver.url())).await;
        assert!(!error.is_permanent() && error.wait().is_none(), "{error}");
        assert_eq!(error.message(), format!("the destination answered {status}: the body"));
    }
}

#[tokio::test]
async fn a_refused_event_is_a_dead_letter_at_once() {
    for status in [400, 401, 403, 404, 405, 409, 413, 415, 422, 451] {
        // The destination cannot make it a retry.
        let receiver = Receiver::answering(status, &[("retry-after", "10")]).await;
        let error = failure(&publisher(&receiver.url())).await;
        assert!(error.is_permanent(), "{error}");
        assert_eq!(error.message(), format!("the destination answered {status}: the body"));
    }
}

#[tokio::test]
async fn a_redirect_is_never_followed() {
    for status in [301, 302, 303, 307, 308] {
        let other = Receiver::accepting().await;
        let location = other.url();
        let receiver = Receiver::start(move |_| {
            let status = axum::http::StatusCode::from_u16(status).unwrap();
            (status, [("location", location.clone())])
        })
        .await;
        let error = failure(&publisher(&receiver.url())).await;
        assert!(error.is_permanent(), "{error}");
        let expected = format!("the destination answered {status}, and redirects are not followed");
        assert_eq!(error.message(), expected);
        receiver.only();
        assert!(other.received().is_empty());
    }
}

#[tokio::test]
async fn a_redirect_loop_costs_one_request() {
    let receiver = Receiver::answering(307, &[("location", "/hook")]).await;
    assert!(failure(&publisher(&receiver.url())).await.is_permanent());
    receiver.only();
}

#[tokio::test]
async fn retry_after_in_seconds_is_honoured() {
    for (status, headers) in [
        (429, &[("retry-after", "120")]),
        (503, &[("retry-after", "120")]),
        (500, &[("retry-after", "120")]),
        (408, &[("retry-after", "120")]),
    ] {
        let receiver = Receiver::answering(status, headers).await;
        let error = failure(&publisher(&receiver.url())).await;
        assert_eq!((error.wait(), error.is_permanent()), (Some(Duration::from_secs(120)), false), "{status}");
    }
}

#[tokio::test]
async fn retry_after_as_a_date_is_honoured() {
    let receiver = Receiver::start(|_| {
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
        (axum::http::StatusCode::SERVICE_UNAVAILABLE, [("retry-after", date)])
    })
    .await;
    let wait = failure(&publisher(&receiver.url())).await.wait().unwrap();
    assert!((50..=60).contains(&wait.as_secs()), "{wait:?}");
}

#[tokio::test]
async fn retry_after_as_a_date_is_compared_with_the_time_of_the_database() {
    let database = SystemTime::now() + Duration::from_secs(600);
    let receiver = Receiver::start(move |_| {
        let date = httpdate::fmt_http_date(database + Duration::from_secs(60));
        (axum::http::StatusCode::SERVICE_UNAVAILABLE, [("retry-after", date)])
    })
    .await;
    let delivery = Delivery::new(Arc::new(event()), "webhook".into(), 1).starting_at(database.into());
    let wait = publisher(&receiver.url()).publish(&delivery).await.unwrap_err().wait().unwrap();
    assert!((50..=60).contains(&wait.as_secs()), "{wait:?}");
}

#[tokio::test]
async fn retry_after_of_more_than_an_hour_is_an_hour() {
    for headers in [
        &[("retry-after", "86400")],
        &[("retry-after", "99999999999999999999999")],
        &[("retry-after", "Fri, 31 Dec 9999 23:59:59 GMT")],
    ] {
        let receiver = Receiver::answering(503, headers).await;
        let error = failure(&publisher(&receiver.url())).await;
        assert_eq!(error.wait(), Some(Duration::from_secs(3600)), "{headers:?}");
    }
}

#[tokio::test]
async fn retry_after_that_says_nothing_is_ignored() {
    for headers in [&[("retry-after", "soon")], &[("retry-after", "-1")], &[("retry-after", "")]] {
        let receiver = Receiver::answering(503, headers).await;
        let error = failure(&publisher(&receiver.url())).await;
        assert!(error.wait().is_none() && !error.is_permanent(), "{headers:?}");
    }
}

#[tokio::test]
async fn the_text_of_a_failure_is_one_short_line() {
    let body = format!("\u{1b}[31m{{\"error\":\r\n\t\"no\0\"}} {}", "x".repeat(2000));
    let receiver = Receiver::start(move |_| (axum::http::StatusCode::BAD_REQUEST, body.clone())).await;
    let error = failure(&publisher(&receiver.url())).await;
    assert!(error.message().starts_with("the destination answered 400: [31m{\"error\": \"no \"} xxx"), "{error}");
    assert!(error.message().ends_with("x…") && error.message().len() < 600, "{error}");
}

/// Writes the head of an answer, then `chunk` again and again after `pause` each, until the other side is gone.
async fn endless(mut connection: TcpStream, head: &str, chunk: &[u8], pause: Duration) -> usize {
    let _ = connection.read(&mut [0; 4096]).await;
    let _ = connection.write_all(head.as_bytes()).await;
    let mut sent = 0;
    while sent < 100 << 20 {
        if connection.write_all(chunk).await.is_err() {
            break;
        }
        sent += chunk.len();
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
    sent
}

#[tokio::test]
async fn of_an_answer_of_100_mb_only_the_beginning_is_read() {
    for (status, delivered) in [(200, true), (500, false)] {
        let (done, mut sent) = mpsc::unbounded_channel();
        let address = raw(move |connection| {
            let done = done.clone();
            async move {
                let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n\r\n", 100 << 20);
                let _ = done.send(endless(connection, &head, &[b'x'; 65536], Duration::ZERO).await);
            }
        })
        .await;
        let result = publish(&publisher(&format!("http://{address}")), event()).await;
        assert_eq!(result.is_ok(), delivered, "{result:?}");
        let sent = tokio::time::timeout(Duration::from_secs(5), sent.recv()).await.expect("the connection is closed");
        // What the buffers of the operating system hold.
        assert!(sent.unwrap() < 20 << 20, "{sent:?} bytes were taken");
    }
}

#[tokio::test]
async fn a_success_does_not_wait_for_its_body() {
    let address = raw(|connection| async {
        endless(connection, "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b"", 50 * MS).await;
    })
    .await;
    let started = Instant::now();
    publish(&publisher(&format!("http://{address}")), event()).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_failure_keeps_its_meaning_when_its_body_drips() {
    for (status, permanent) in [(400, true), (503, false)] {
        let address = raw(move |connection| async move {
            let head = format!("HTTP/1.1 {status} X\r\nretry-after: 7\r\ncontent-length: 1000\r\n\r\n");
            endless(connection, &head, b"z", 50 * MS).await;
        })
        .await;
        let publisher = publisher(&format!("http://{address}")).timeout(300 * MS).unwrap();
        let started = Instant::now();
        let error = failure(&publisher).await;
        assert!(started.elapsed() < 600 * MS, "{:?}", started.elapsed());
        assert!(error.message().starts_with(&format!("the destination answered {status}: z")), "{error}");
        assert_eq!(error.is_permanent(), permanent);
        assert_eq!(error.wait(), (!permanent).then_some(Duration::from_secs(7)));
    }
}

#[tokio::test]
async fn an_answer_whose_head_drips_times_out() {
    let head = "HTTP/1.1 200 OK\r\nx: ";
    let address = raw(move |connection| async move {
        endless(connection, head, b"x", 50 * MS).await;
    })
    .await;
    let publisher = publisher(&format!("http://{address}")).timeout(300 * MS).unwrap();
    let started = Instant::now();
    let error = failure(&publisher).await;
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!((error.message(), error.is_permanent()), ("timed out after 0.3 s", false));
}

#[tokio::test]
async fn an_answer_whose_head_has_no_end_is_tried_again() {
    let address = raw(|connection| async {
        endless(connection, "HTTP/1.1 200 OK\r\nx: ", &[b'x'; 4096], Duration::ZERO).await;
    })
    .await;
    let error = failure(&publisher(&format!("http://{address}"))).await;
    assert!(!error.is_permanent(), "{error}");
    assert!(error.message().starts_with(&format!("no answer from http://{address}: ")), "{error}");
}

#[tokio::test]
async fn an_answer_with_many_headers_is_an_answer() {
    for (status, taken) in [(200, true), (500, false)] {
        let address = raw(move |mut connection| async move {
            let _ = connection.read(&mut [0; 4096]).await;
            let headers: String = (0..500).map(|n| format!("x-header-{n}: value\r\n")).collect();
            let head = format!("HTTP/1.1 {status} X\r\n{headers}content-length: 0\r\n\r\n");
            let _ = connection.write_all(head.as_bytes()).await;
        })
        .await;
        let result = publish(&publisher(&format!("http://{address}")), event()).await;
        assert_eq!(result.is_ok(), taken, "{result:?}");
        assert!(taken || result.unwrap_err().message().starts_with("the destination answered 500"));
    }
}

/// The destination is there, and answers this event so each time: attempts are spent.
#[tokio::test]
async fn an_answer_that_cannot_be_read_is_about_the_event() {
    let too_many: String = (0..2000).map(|n| format!("x{n}: v\r\n")).collect();
    let heads = [
        format!("HTTP/1.1 200 OK\r\n{too_many}\r\n"),
        format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(200_000)),
        "SSH-2.0\r\n".to_owned(),
    ];
    for head in heads {
        let address = raw(move |mut connection| {
            let head = head.clone();
            async move {
                let _ = connection.read(&mut [0; 4096]).await;
                let _ = connection.write_all(head.as_bytes()).await;
                let _ = connection.read(&mut [0; 4096]).await;
            }
        })
        .await;
        let error = failure(&publisher(&format!("http://{address}"))).await;
        assert_eq!(error.reason(), outbox_core::Reason::Failed, "{error}");
        assert!(error.message().contains("what came cannot be read"), "{error}");
    }
}

#[tokio::test]
async fn what_is_not_http_is_tried_again() {
    for answer in
        ["", "SSH-2.0-OpenSSH_9.6\r\n", "HTTP/1.1 999999 X\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"]
    {
        let address = raw(move |mut connection| async move {
            let _ = connection.read(&mut [0; 4096]).await;
            let _ = connection.write_all(answer.as_bytes()).await;
        })
        .await;
        let error = failure(&publisher(&format!("http://{address}"))).await;
        assert!(!error.is_permanent(), "{error}");
        assert!(error.message().starts_with(&format!("no answer from http://{address}: ")), "{error}");
    }
}

#[tokio::test]
async fn an_abandoned_attempt_closes_its_connection() {
    let closed = Arc::new(AtomicUsize::new(0));
    let count = closed.clone();
    let address = raw(move |mut connection| {
        let count = count.clone();
        async move {
            while connection.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {}
            count.fetch_add(1, Ordering::SeqCst);
        }
    })
    .await;
    let publisher = publisher(&format!("http://{address}"));
    let delivery = outbox_core::Delivery::new(Arc::new(event()), "webhook".into(), 1);
    tokio::time::timeout(100 * MS, publisher.publish(&delivery)).await.expect_err("nobody answers");
    tokio::time::timeout(Duration::from_secs(5), async {
        while closed.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(MS).await;
        }
    })
    .await
    .expect("the connection is closed");
}
