//! What a worker does beside delivering: it shows that it is alive, looks after its subscriptions, and takes away what is
//! old.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::Subscription;
use outbox_seaorm::{Outbox, Purged, RegisterError, Retention, WorkerStatus};

use super::StartError;
use crate::{
    assignment::{Share, SubscriptionId},
    clock::DatabaseClock,
};

/// How often a worker shows that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How often what is old is taken away.
const SHORTEST_PURGE: Duration = Duration::from_secs(1);

const LONGEST_PURGE: Duration = Duration::from_secs(60);

/// How often the log says again what is wrong with a subscription.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// When a worker that was killed disappears from the dashboards.
const FORGET_AFTER: Duration = Duration::from_secs(3600);

/// Shows that the worker is alive, and mends what only time can tell.
pub(super) async fn upkeep(
    outbox: Outbox,
    worker: Arc<str>,
    mut registrations: Vec<Registration>,
    clock: DatabaseClock,
) {
    let mut interval = tokio::time::interval(HEARTBEAT);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        if let Err(error) = beat(&outbox, &worker, &mut registrations, &clock).await {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(error, "heartbeat failed");
        }
    }
}

async fn beat(
    outbox: &Outbox,
    worker: &str,
    registrations: &mut [Registration],
    clock: &DatabaseClock,
) -> Result<(), StartError> {
    let subscriptions: Vec<&Subscription> = registrations.iter().map(|each| &each.subscription).collect();
    let asked_at = Instant::now();
    clock.set(outbox.heartbeat(worker, &subscriptions).await?, asked_at);
    outbox.forget_workers(FORGET_AFTER).await?;
    let stored = outbox.registered(&subscriptions).await?;
    for (registration, stored) in registrations.iter_mut().zip(stored) {
        registration.look_after(outbox, worker, stored).await?;
    }
    if registrations.iter().any(|registration| registration.subscription.limits().fleet_concurrency.is_some()) {
        let workers = outbox.workers().await?;
        registrations.iter_mut().for_each(|registration| registration.share_with(&workers, worker));
    }
    outbox.sweep_removed().await?;
    Ok(())
}

/// A subscription as this worker registered it. Others may change it, remove it, and register it again.
pub(super) struct Registration {
    subscription: Subscription,
    id: SubscriptionId,
    /// How many deliveries this process may have under way, of those that all workers may have together.
    share: Share,
    /// Whether the other workers know of this one: they had a heartbeat since it had its first.
    is_known: bool,
    /// When the log last had it that something is wrong.
    said_at: Option<Instant>,
}

impl Registration {
    /// `kept_by` is who has a definition that stays.
    pub(super) fn new(subscription: Subscription, id: SubscriptionId, share: Share, kept_by: Option<&str>) -> Self {
        // Until its first look nobody knows how many there are.
        if subscription.limits().fleet_concurrency.is_some() {
            share.set(0);
        }
        let mut registration = Self { subscription, id, share, is_known: false, said_at: None };
        registration.judge(kept_by);
        registration
    }

    /// `stored` is the id, and whether it is defined as here.
    async fn look_after(
        &mut self,
        outbox: &Outbox,
        worker: &str,
        stored: Option<(i32, bool)>,
    ) -> Result<(), RegisterError> {
        let name = self.subscription.name();
        let changed = self.id.set(stored.map(|(id, _)| id));
        match stored {
            // Who removed it did not want it back; and what was pushed since then would be missing in it.
            None => self.say(|name| {
                tracing::error!(
                    subscription = name,
                    "the subscription was removed, nothing is delivered; start this worker again to register it anew, or \
                     without it"
                );
            }),
            Some(_) if changed => {
                tracing::warn!(subscription = name, "the subscription was registered anew; this worker goes on with it");
            }
            Some((_, true)) => self.said_at = None,
            Some((_, false)) => {
                let registered = outbox.register_as(&self.subscription, worker).await?;
                self.judge(registered.kept_by.as_deref());
            }
        }
        Ok(())
    }

    /// Shares the concurrency with those that are alive.
    fn share_with(&mut self, workers: &[WorkerStatus], worker: &str) {
        let Some(limit) = self.subscription.limits().fleet_concurrency else { return };
        let name = self.subscription.name();
        let serves = |other: &&WorkerStatus| other.subscriptions.iter().any(|each| each == name);
        let mut alive: Vec<&str> = workers
            .iter()
            .filter(|other| other.id == worker || other.is_alive())
            .filter(serves)
            .map(|other| other.id.as_str())
            .collect();
        alive.sort_unstable();
        let is_known = std::mem::replace(&mut self.is_known, true) || alive.len() <= 1;
        self.share.set(if is_known { share(limit, &alive, worker) } else { 0 });
    }

    /// Says so if another definition stays.
    fn judge(&mut self, kept_by: Option<&str>) {
        match kept_by {
            None => self.said_at = None,
            Some(other) => self.say(|name| {
                tracing::warn!(
                    subscription = name,
                    other,
                    "this worker has an older definition of the subscription than another that is alive; the newer one \
                     counts until its last worker ends"
                );
            }),
        }
    }

    fn say(&mut self, say: impl FnOnce(&str)) {
        if self.said_at.is_none_or(|at| at.elapsed() >= SAY_AGAIN) {
            self.said_at = Some(Instant::now());
            say(self.subscription.name());
        }
    }
}

/// What this one of several workers gets of a number; all of them together get all of it.
fn share(number: usize, workers: &[&str], worker: &str) -> usize {
    let (many, place) = (workers.len().max(1), workers.iter().position(|each| *each == worker).unwrap_or(0));
    number / many + usize::from(place < number % many)
}

/// Takes away what is older than the retention, again and again.
pub(super) async fn purging(outbox: Outbox, retention: Retention) {
    let interval = (retention.shortest() / 10).clamp(SHORTEST_PURGE, LONGEST_PURGE);
    loop {
        // Workers that start together do not purge together.
        tokio::time::sleep(interval.mul_f64(fastrand::f64().mul_add(0.2, 0.9))).await;
        match outbox.purge(&retention).await {
            Ok(purged) if purged != Purged::default() => tracing::debug!(?purged, "took away what is old"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "cannot take away what is old, trying again later"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_shares_together_are_the_whole() {
        for (number, workers) in [(10, 3), (2, 3), (1, 1), (7, 7), (100, 6)] {
            let names: Vec<String> = (0..workers).map(|n| format!("w{n}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let shares: Vec<usize> = names.iter().map(|name| share(number, &names, name)).collect();
            assert_eq!(shares.iter().sum::<usize>(), number);
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
        }
    }
}
