use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use apalis_core::backend::codec::Codec;
use outbox_core::store::LaneRef;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};

/// What travels through Redis: a relay's lease, and nothing of an event. Whoever takes it over asks the database what is to
/// be delivered, so whoever can write to Redis can take leases away, which then end, and nothing else.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) lane: LaneRef,
    /// It finds out whether a destination that was down is back.
    pub(crate) probe: bool,
}

/// A job as Redis has it; `None` if somebody garbled it there.
pub(crate) struct Readable(pub(crate) Option<Job>);

/// Reads whatever Redis answers: an error would end the apalis worker.
#[derive(Clone, Debug)]
pub(crate) struct JobCodec;

impl Codec<Readable> for JobCodec {
    type Error = serde_json::Error;
    type Compact = Vec<u8>;

    fn encode(&self, Readable(job): &Readable) -> Result<Vec<u8>, Self::Error> {
        serde_json::to_vec(job)
    }

    fn decode(&self, text: &Vec<u8>) -> Result<Readable, Self::Error> {
        Ok(Readable(serde_json::from_slice(text).unwrap_or_default()))
    }
}

/// Jobs that came out of Redis and wait for the feed; a few, so that other workers get the others.
#[derive(Debug)]
pub(crate) struct Jobs {
    waiting: Mutex<VecDeque<Job>>,
    room: Semaphore,
    /// The same for all subscriptions of a worker.
    arrived: Arc<Notify>,
}

impl Jobs {
    pub(crate) fn new(room: usize, arrived: Arc<Notify>) -> Self {
        Self { waiting: Mutex::default(), room: Semaphore::new(room), arrived }
    }

    /// Waits for room.
    pub(crate) async fn put(&self, job: Job) {
        // The semaphore is never closed.
        if let Ok(permit) = self.room.acquire().await {
            permit.forget();
        }
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push_back(job);
        self.arrived.notify_one();
    }

    /// Waits until there may be a job, of any subscription of the worker.
    pub(crate) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    pub(crate) fn are_waiting(&self) -> bool {
        !self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    pub(crate) fn take(&self, jobs: usize) -> Vec<Job> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.min(waiting.len());
        self.room.add_permits(jobs);
        waiting.drain(..jobs).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;

    /// Values as somebody would write them who knows the format a little.
    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        let name = prop_oneof![
            "lane|probe|run|key|token|id|event_id|event_type|payload|position|attempts|tags|actor",
            any::<String>(),
        ];
        leaf.prop_recursive(4, 32, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((name.clone(), inner), 0..4)
                    .prop_map(|members| Value::from(members.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_redis_has_is_a_job_or_none(
            text in prop_oneof![
                any::<Vec<u8>>(),
                value().prop_map(|value| value.to_string().into_bytes()),
                (value(), any::<bool>()).prop_map(|(lane, probe)| json!({"lane": lane, "probe": probe}).to_string().into()),
                (1..6000_usize).prop_map(|depth| "[".repeat(depth).into_bytes()),
            ],
        ) {
            // An error would end the apalis worker.
            let read = JobCodec.decode(&text);
            prop_assert!(read.is_ok());
        }
    }
}
