//! What a worker does beside delivering: it shows that it is alive, looks after its subscriptions, and takes away what is
//! old.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_core::Subscription;
use outbox_seaorm::{Outbox, Purged, RegisterError, Retention};

use super::StartError;
use crate::{assignment::SubscriptionId, clock::DatabaseClock};

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
    outbox.sweep_removed().await?;
    Ok(())
}

/// A subscription as this worker registered it. Others may change it, remove it, and register it again.
pub(super) struct Registration {
    subscription: Subscription,
    id: SubscriptionId,
    /// When the log last had it that something is wrong.
    said_at: Option<Instant>,
}

impl Registration {
    /// `kept_by` is who has a definition that stays.
    pub(super) fn new(subscription: Subscription, id: SubscriptionId, kept_by: Option<&str>) -> Self {
        let mut registration = Self { subscription, id, said_at: None };
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
