//! What this process has run out of says nothing about a destination.

use std::fs::File;

use outbox_core::Reason;

use crate::fixture::{Receiver, event, failure, in_limited_child, publish, publisher};

#[tokio::test]
async fn without_file_descriptors_an_attempt_has_not_begun() {
    if !in_limited_child("limits::without_file_descriptors_an_attempt_has_not_begun", 64) {
        return;
    }
    let receiver = Receiver::accepting().await;
    // Each keeps its connection: nothing is closed in between.
    let publishers = [receiver.url(), receiver.url().replace("127.0.0.1", "localhost")].map(|url| publisher(&url));
    for publisher in &publishers {
        let mut open = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            open.push(file);
        }
        let error = failure(publisher).await;
        assert_eq!(error.reason(), Reason::NotBegun, "{error}");
        assert!(error.message().contains("this process has no file descriptors left; raise its limit"), "{error}");
        drop(open);
        publish(publisher, event()).await.unwrap();
    }
}
