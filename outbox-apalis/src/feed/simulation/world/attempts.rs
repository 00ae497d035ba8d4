//! Attempts from their begin to their end.

use outbox_core::{
    DeliveryError, Outcome,
    store::{Finished, LaneReport, Next, Settled},
};

use super::{Event, World};
use crate::{
    destination::{AttemptResult, End, no_result},
    feed::simulation::{effects::Behaviour, process::Running},
};

impl World {
    pub(super) fn begins(&mut self, place: usize, id: u64) {
        let now = self.now;
        let Some(process) = &mut self.processes[place] else { return };
        let generation = process.generation;
        let Some(attempt) = process.attempts.iter_mut().find(|attempt| attempt.id == id) else { return };
        attempt.began_at = Some(now);
        if attempt.start.cancelled.is_cancelled() {
            self.schedule(now, generation, Event::Ends { place, id });
            return;
        }
        let (key, tenant) = (attempt.start.lane.key.clone(), attempt.start.event.tenant.clone());
        attempt.start.running.begun().store(true, std::sync::atomic::Ordering::Release);
        let minds_time = !matches!(attempt.behaviour, Behaviour::Blocks(_));
        let lasts = if minds_time { attempt.lasts.min(attempt.start.time) } else { attempt.lasts };
        let subscription = attempt.subscription;
        let under_way = process.attempts_of(subscription).filter(|attempt| attempt.is_under_way());
        let of_key = under_way.clone().filter(|attempt| attempt.start.lane.key == key).count();
        assert!(of_key <= 1, "{key} has {of_key} attempts at once in one process");
        let of_tenant = under_way.clone().filter(|attempt| attempt.start.event.tenant == tenant).count();
        assert!(of_tenant <= self.plan.options.of_tenant.unwrap_or(usize::MAX), "too many attempts of one tenant");
        assert!(under_way.count() <= self.plan.options.concurrency, "too many attempts at once");
        self.schedule(now + lasts, generation, Event::Ends { place, id });
        self.act(place);
    }

    pub(super) fn ends(&mut self, place: usize, id: u64) {
        let Some(process) = &mut self.processes[place] else { return };
        let Some(index) = process.attempts.iter().position(|attempt| attempt.id == id) else { return };
        let attempt = process.attempts.remove(index);
        let never_began = attempt.began_at.is_none();
        let cancelled = attempt.start.cancelled.is_cancelled() && !matches!(attempt.behaviour, Behaviour::Blocks(_));
        if attempt.behaviour == Behaviour::Kills && !never_began && !cancelled {
            self.kill(place);
            return;
        }
        let end = if never_began || cancelled { End::Cancelled } else { self.outcome(place, &attempt) };
        self.says(|| format!("attempt {} of {} ends: {end:?}", attempt.start.number, attempt.start.event.position));
        let at = self.moment();
        let Some(process) = &mut self.processes[place] else { return };
        let lane = &attempt.start.lane;
        let started = attempt.began_at.unwrap_or(self.now);
        let result = AttemptResult { key: lane.key.clone(), attempt: attempt.start.running.id(), end, started };
        process.dispatch.touch(attempt.subscription, |core| core.ended(result, at));
        self.act(place);
    }

    /// What an attempt comes to that has run to its end.
    pub(super) fn outcome(&mut self, place: usize, attempt: &Running) -> End {
        let retry = |error| End::Outcome(Outcome::Retry(error));
        let outside = self.plan.outside;
        if outside && self.down_until > self.now {
            return retry(DeliveryError::unreachable("the destination is down"));
        }
        match attempt.behaviour {
            Behaviour::Fails => retry(DeliveryError::retry("no")),
            Behaviour::Refused => End::Outcome(Outcome::Permanent(DeliveryError::permanent("never"))),
            Behaviour::Hangs(_) if outside => retry(DeliveryError::unavailable(no_result(attempt.start.time))),
            Behaviour::Hangs(_) => retry(DeliveryError::retry(no_result(attempt.start.time))),
            Behaviour::Unknown if place != 0 => End::Unknown,
            _ if attempt.start.event.event_type == "transactional" => self.commits(place, attempt),
            _ => {
                self.effect(attempt);
                End::Outcome(Outcome::Delivered)
            }
        }
    }

    pub(super) fn effect(&mut self, attempt: &Running) {
        let key = &attempt.start.lane.key;
        let id = self.subscriptions[attempt.subscription].id;
        let held_at = self.model.lanes(id).find(|(lane, _)| lane == key).and_then(|(_, lane)| lane.held_at);
        self.effects.happens(&attempt.start.event, held_at);
    }

    /// An effect and its acknowledgement, in one transaction.
    pub(super) fn commits(&mut self, place: usize, attempt: &Running) -> End {
        if self.away_until > self.now {
            return End::Unavailable(DeliveryError::retry("the database is away"));
        }
        let start = &attempt.start;
        let finished =
            Finished { position: start.event.position, attempts: start.number, log: start.log.clone(), error: None };
        let next = if start.last { Next::Yield } else { Next::Keep };
        let report = LaneReport { lane: start.lane.clone(), finished: vec![finished], next };
        self.unwritten = None;
        match self.model.settle(self.utc(), &[report])[..] {
            [Settled::Done] => {
                self.effect(attempt);
                // If the answer is lost, nobody knows.
                if self.chance(self.plan.lost) {
                    let (generation, _) = self.losses[place];
                    self.loses_connection(place, generation);
                    return End::Superseded;
                }
                End::Settled
            }
            _ => End::Superseded,
        }
    }
}
