//! Where the subscription `sink` of the conformance application posts to.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode},
    routing::post,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;
use tokio::net::TcpListener;

/// What the application signs with.
pub const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// Takes every event that is signed, and remembers them in the order of their arrivals.
#[derive(Clone, Debug, Default)]
pub struct Sink {
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    refused: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    mood: Arc<Mutex<Mood>>,
    at_work: Arc<AtomicUsize>,
    most_at_work: Arc<AtomicUsize>,
}

/// What becomes of an event that is signed.
#[derive(Clone, Copy, Debug, Default)]
pub enum Mood {
    /// It is taken at once.
    #[default]
    Take,
    /// It is taken, or refused with 500 so many times in a hundred, after a while.
    Fail {
        /// How often.
        percent: u8,
        /// How long each takes.
        after: Duration,
    },
    /// It is refused with this status.
    Status(u16),
    /// It arrives, and the answer, with this status, waits.
    Answer {
        /// The status.
        status: u16,
        /// How long it waits.
        after: Duration,
    },
}

/// An event as it came.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The CloudEvent.
    pub event: Value,
    /// The same, byte for byte.
    pub body: Bytes,
    /// The seconds that it was signed with.
    pub timestamp: i64,
    /// When it came.
    pub at: Instant,
}

impl Sink {
    /// Listens, and returns its URL.
    ///
    /// # Panics
    ///
    /// If no port is free.
    pub async fn start(&self) -> String {
        self.serve(TcpListener::bind("127.0.0.1:0").await.expect("a free port"))
    }

    /// Answers what comes to this listener, and returns its URL.
    ///
    /// # Panics
    ///
    /// If the listener has no address.
    pub fn serve(&self, listener: TcpListener) -> String {
        let url = format!("http://{}/sink", listener.local_addr().expect("a bound port"));
        let router = Router::new().route("/sink", post(take)).layer(DefaultBodyLimit::disable());
        let router = router.with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    /// Changes what becomes of events.
    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap_or_else(PoisonError::into_inner) = mood;
    }

    /// How many events were under way at the same time, at most.
    #[must_use]
    pub fn most_at_work(&self) -> usize {
        self.most_at_work.load(Ordering::SeqCst)
    }

    /// All arrivals, repetitions included.
    #[must_use]
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.lock().clone()
    }

    /// The events without repetitions, in the order of their first arrivals.
    #[must_use]
    pub fn first_arrivals(&self) -> Vec<Value> {
        let mut seen = HashSet::new();
        let arrivals = self.lock();
        let first = arrivals.iter().filter(|arrival| seen.insert(arrival.event["id"].to_string()));
        first.map(|arrival| arrival.event.clone()).collect()
    }

    /// The running numbers of each key in the order of their first arrivals.
    #[must_use]
    pub fn numbers(&self) -> HashMap<String, Vec<i64>> {
        let mut numbers: HashMap<String, Vec<i64>> = HashMap::new();
        for event in self.first_arrivals() {
            let key = event["data"]["key"].as_str().unwrap_or_default().to_owned();
            numbers.entry(key).or_default().extend(event["data"]["seq"].as_i64());
        }
        numbers
    }

    /// How many requests came that were signed, whatever became of them.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// How many arrivals were not what was signed.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arrival>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn take(State(sink): State<Sink>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let at = Instant::now();
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
    match serde_json::from_slice::<Value>(&body) {
        Ok(event) if event["id"] == id && header("webhook-signature") == signature(id, timestamp, &body) => {
            sink.asked.fetch_add(1, Ordering::SeqCst);
            let at_work = sink.at_work.fetch_add(1, Ordering::SeqCst) + 1;
            sink.most_at_work.fetch_max(at_work, Ordering::SeqCst);
            let mood = *sink.mood.lock().unwrap_or_else(PoisonError::into_inner);
            let status = match mood {
                Mood::Take => StatusCode::NO_CONTENT,
                Mood::Status(status) => StatusCode::from_u16(status).expect("a status"),
                Mood::Fail { percent, after } => {
                    tokio::time::sleep(after).await;
                    if fastrand::u8(..100) < percent {
                        StatusCode::INTERNAL_SERVER_ERROR
                    } else {
                        StatusCode::NO_CONTENT
                    }
                }
                Mood::Answer { status, .. } => StatusCode::from_u16(status).expect("a status"),
            };
            if status.is_success() || matches!(mood, Mood::Answer { .. }) {
                let timestamp = timestamp.parse().unwrap_or_default();
                sink.lock().push(Arrival { event, body, timestamp, at });
            }
            if let Mood::Answer { after, .. } = mood {
                tokio::time::sleep(after).await;
            }
            sink.at_work.fetch_sub(1, Ordering::SeqCst);
            status
        }
        _ => {
            sink.refused.fetch_add(1, Ordering::SeqCst);
            StatusCode::BAD_REQUEST
        }
    }
}

/// The signature of Standard Webhooks.
fn signature(id: &str, timestamp: &str, body: &[u8]) -> String {
    let key = BASE64_STANDARD.decode(SECRET.strip_prefix("whsec_").expect("the prefix")).expect("base64");
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("a key of any length");
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()))
}
