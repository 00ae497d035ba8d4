//! What apalis-board shows: the database's deliveries, workers and counts.

use apalis_core::{
    backend::{
        FetchById, Filter, ListAllTasks, ListQueues, ListTasks, ListWorkers, Metrics, QueueInfo, RunningWorker,
        StatType, Statistic, queue::Queue,
    },
    task::{Task, builder::TaskBuilder, metadata::MetadataStore, status::Status, task_id::TaskId},
};
use chrono::{DateTime, Utc};
use outbox_core::RecordedEvent;
use outbox_seaorm::{DeliveryRecord, DeliveryState, SubscriptionStatus, WorkerStatus};
use serde::de::IgnoredAny;

use crate::{
    backend::{BackendError, OutboxBackend},
    task::DeliveryTask,
};

/// The longest page that is read.
const MAX_PAGE: u32 = 200;

/// An event has one delivery for each subscription; the id names both.
pub(crate) fn task_id(subscription: &str, event: &RecordedEvent) -> String {
    format!("{subscription}:{}", event.id)
}

fn seconds(at: DateTime<Utc>) -> u64 {
    at.timestamp().unsigned_abs()
}

fn task(mut record: DeliveryRecord) -> Task<DeliveryTask> {
    if record.unreadable.is_some() && serde_json::from_str::<IgnoredAny>(&record.event.payload).is_err() {
        // As text: one that is not JSON would cost the page all its other tasks.
        record.event.payload = serde_json::Value::from(record.event.payload).to_string();
    }
    let mut metadata = MetadataStore::new();
    let event_type = Some(record.event.event_type.clone());
    let shown = [("event_type", event_type), ("error", record.error), ("unreadable", record.unreadable)];
    for (name, value) in shown {
        if let Some(value) = value {
            // Fails only for a name that is there already.
            let _ = metadata.insert(name, value);
        }
    }
    let (status, run_at) = match record.state {
        DeliveryState::Pending => (Status::Pending, record.due_at),
        DeliveryState::Leased => (Status::Running, Some(record.event.recorded_at)),
        DeliveryState::Delivered => (Status::Done, Some(record.event.recorded_at)),
        DeliveryState::Dead => (Status::Killed, Some(record.event.recorded_at)),
    };
    let mut builder = TaskBuilder::new(())
        .task_id(TaskId::from_string(task_id(&record.subscription, &record.event)))
        .attempt(record.attempts as usize)
        .status(status)
        .queue(Queue::from(record.subscription))
        .run_at_timestamp(seconds(run_at.unwrap_or(record.event.recorded_at)))
        .done_at(record.finished_at.map(seconds))
        .lock_by(record.leased_by)
        .with_metadata(metadata);
    if let Some(attempts) = record.event.max_attempts {
        builder = builder.max_attempts(attempts as usize);
    }
    builder.build().map_args(|()| DeliveryTask::listed(record.event))
}

fn state(status: &Status) -> Option<DeliveryState> {
    match status {
        Status::Pending | Status::Queued => Some(DeliveryState::Pending),
        Status::Running => Some(DeliveryState::Leased),
        Status::Done => Some(DeliveryState::Delivered),
        Status::Failed | Status::Killed => Some(DeliveryState::Dead),
        _ => None,
    }
}

impl OutboxBackend {
    async fn page(&self, subscription: Option<&str>, filter: &Filter) -> Result<Vec<Task<DeliveryTask>>, BackendError> {
        let limit = filter.limit().min(MAX_PAGE);
        // Not `Filter::offset`: it overflows for a page 0.
        let offset = filter.page.saturating_sub(1).saturating_mul(limit);
        let state = match &filter.status {
            None => None,
            Some(status) => match state(status) {
                None => return Ok(Vec::new()),
                state => state,
            },
        };
        let records = self.outbox()?.deliveries(subscription, state, offset, limit).await?;
        Ok(records.into_iter().map(task).collect())
    }

    async fn running(&self, subscription: Option<&str>) -> Result<Vec<RunningWorker>, BackendError> {
        let workers = self.outbox()?.workers().await?;
        Ok(workers.iter().flat_map(|worker| queues_of(worker, subscription)).collect())
    }
}

fn queues_of(worker: &WorkerStatus, subscription: Option<&str>) -> Vec<RunningWorker> {
    let queues = worker.subscriptions.iter().filter(|queue| subscription.is_none_or(|wanted| wanted == *queue));
    queues
        .map(|queue| RunningWorker {
            id: format!("{} {queue}", worker.id),
            queue: queue.clone(),
            backend: "outbox".to_owned(),
            started_at: seconds(worker.started_at),
            last_heartbeat: seconds(worker.last_seen_at),
            layers: "one attempt, acknowledged in the database".to_owned(),
        })
        .collect()
}

impl ListTasks for OutboxBackend {
    async fn list_tasks(&self, filter: &Filter) -> Result<Vec<Task<DeliveryTask>>, BackendError> {
        self.page(Some(&self.subscription), filter).await
    }
}

impl ListAllTasks for OutboxBackend {
    async fn list_all_tasks(&self, filter: &Filter) -> Result<Vec<Task<DeliveryTask>>, BackendError> {
        self.page(None, filter).await
    }
}

impl FetchById for OutboxBackend {
    async fn fetch_by_id(&mut self, id: &TaskId) -> Result<Option<Task<DeliveryTask>>, BackendError> {
        // An id of another form names nothing that there is.
        let Ok(event) = self.event_id(&id.to_string()) else { return Ok(None) };
        Ok(self.outbox()?.delivery(&self.subscription, event).await?.map(task))
    }
}

impl ListWorkers for OutboxBackend {
    async fn list_workers(&self) -> Result<Vec<RunningWorker>, BackendError> {
        self.running(Some(&self.subscription)).await
    }

    async fn list_all_workers(&self) -> Result<Vec<RunningWorker>, BackendError> {
        self.running(None).await
    }
}

impl ListQueues for OutboxBackend {
    async fn list_queues(&self) -> Result<Vec<QueueInfo>, BackendError> {
        let status = self.outbox()?.status().await?;
        let mut queues = Vec::with_capacity(status.subscriptions.len());
        for subscription in &status.subscriptions {
            let activity = self.outbox()?.activity(&subscription.name).await?;
            let workers = status.workers.iter().filter(|worker| worker.subscriptions.contains(&subscription.name));
            queues.push(QueueInfo {
                name: subscription.name.clone(),
                stats: statistics(std::slice::from_ref(subscription)),
                workers: workers.map(|worker| worker.id.clone()).collect(),
                activity: activity.iter().map(|day| usize::try_from(*day).unwrap_or(usize::MAX)).collect(),
            });
        }
        Ok(queues)
    }
}

impl Metrics for OutboxBackend {
    async fn global(&self) -> Result<Vec<Statistic>, BackendError> {
        Ok(statistics(&self.outbox()?.status().await?.subscriptions))
    }

    async fn fetch_by_queue(&self) -> Result<Vec<Statistic>, BackendError> {
        let mut subscriptions = self.outbox()?.status().await?.subscriptions;
        subscriptions.retain(|subscription| subscription.name == self.subscription);
        Ok(statistics(&subscriptions))
    }
}

/// The titles are those that the page of apalis-board knows; it calls every other one "Total Jobs".
fn statistics(subscriptions: &[SubscriptionStatus]) -> Vec<Statistic> {
    let sum = |count: fn(&SubscriptionStatus) -> i64| subscriptions.iter().map(count).sum::<i64>();
    let (pending, leased) = (sum(|each| each.pending), sum(|each| each.leased));
    let (delivered, dead) = (sum(|each| each.delivered), sum(|each| each.dead));
    let numbers = [
        ("TOTAL_JOBS", pending + delivered + dead),
        ("PENDING_JOBS", pending - leased),
        ("RUNNING_JOBS", leased),
        ("DONE_JOBS", delivered),
        ("KILLED_JOBS", dead),
    ];
    let statistic = |((title, value), priority): ((&str, i64), u64)| Statistic {
        title: title.to_owned(),
        stat_type: StatType::Number,
        value: value.to_string(),
        priority: Some(priority),
    };
    numbers.into_iter().zip(1..).map(statistic).collect()
}
