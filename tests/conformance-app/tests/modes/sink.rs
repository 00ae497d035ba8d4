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
use serde_json::Value;
use tokio::net::TcpListener;

/// Takes every event, and remembers them in the order of their arrivals.
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
    let signed = headers["webhook-id"] == event["id"].as_str().unwrap()
        && headers["webhook-signature"].to_str().unwrap().starts_with("v1,")
        && headers.contains_key("webhook-timestamp");
    if !signed {
        return StatusCode::BAD_REQUEST;
    }
    sink.arrivals.lock().unwrap().push(event);
    StatusCode::NO_CONTENT
}
