//! Where the subscription `sink` posts to.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::post,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// Takes every event that is signed, and remembers them in the order of their arrivals.
#[derive(Clone, Default)]
pub(crate) struct Sink {
    arrivals: Arc<Mutex<Vec<Value>>>,
}

impl Sink {
    /// Listens, and returns its URL.
    pub(crate) async fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/sink", listener.local_addr().unwrap());
        let router = Router::new().route("/sink", post(take)).with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    /// The events without repetitions, in the order of their first arrivals.
    pub(crate) fn first_arrivals(&self) -> Vec<Value> {
        let mut seen = HashSet::new();
        let arrivals = self.arrivals.lock().unwrap();
        arrivals.iter().filter(|event| seen.insert(event["id"].to_string())).cloned().collect()
    }

    /// The running numbers of each key in the order of their first arrivals.
    pub(crate) fn numbers(&self) -> HashMap<String, Vec<i64>> {
        let mut numbers: HashMap<String, Vec<i64>> = HashMap::new();
        for event in self.first_arrivals() {
            let key = event["data"]["key"].as_str().unwrap().to_owned();
            numbers.entry(key).or_default().extend(event["data"]["seq"].as_i64());
        }
        numbers
    }
}

async fn take(State(sink): State<Sink>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let event: Value = serde_json::from_slice(&body).unwrap();
    let header = |name: &str| headers[name].to_str().unwrap();
    let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
    if event["id"] != id || header("webhook-signature") != signature(id, timestamp, &body) {
        return StatusCode::BAD_REQUEST;
    }
    sink.arrivals.lock().unwrap().push(event);
    StatusCode::NO_CONTENT
}

/// The signature of Standard Webhooks.
fn signature(id: &str, timestamp: &str, body: &[u8]) -> String {
    let key = BASE64_STANDARD.decode(SECRET.strip_prefix("whsec_").unwrap()).unwrap();
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()))
}
