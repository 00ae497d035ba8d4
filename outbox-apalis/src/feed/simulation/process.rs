//! A worker's process: its core, and the attempts that are under way in it.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    effects::{Behaviour, Place},
    plan::Plan,
};
use crate::{
    assignment::Until,
    feed::{
        core::{Core, Settings, Start},
        dispatch::Dispatch,
    },
    redis::Job,
};

pub(super) struct Process {
    pub(super) name: Arc<str>,
    /// Another one for each process at this place.
    pub(super) generation: u32,
    pub(super) dispatch: Dispatch,
    pub(super) attempts: Vec<Running>,
    /// What has come out of Redis, of each subscription.
    pub(super) jobs: Vec<VecDeque<Job>>,
    /// How many connections its cores know to be lost.
    pub(super) known_losses: u64,
    /// It stands still until then.
    pub(super) frozen_until: Instant,
    /// When it looks at the time next.
    pub(super) wakes_at: Option<Instant>,
    /// How many results of each subscription are being stored.
    pub(super) settling: Vec<usize>,
    /// Its cores that have not stopped as they were told.
    pub(super) left: usize,
    /// How often it has acted at this moment.
    pub(super) acts: (Instant, u32),
}

/// An attempt that was handed out.
pub(super) struct Running {
    pub(super) id: u64,
    pub(super) subscription: usize,
    pub(super) start: Start,
    pub(super) behaviour: Behaviour,
    pub(super) lasts: Duration,
    pub(super) began_at: Option<Instant>,
    /// Its cancellation was seen.
    pub(super) is_cancelled: bool,
}

impl Running {
    /// Whether it is at work, and nobody has told it to stop.
    pub(super) fn is_under_way(&self) -> bool {
        self.began_at.is_some() && !self.start.cancelled.is_cancelled()
    }

    /// Whether it minds a cancellation that it has not seen.
    pub(super) fn is_to_be_cancelled(&self) -> bool {
        !self.is_cancelled && self.start.cancelled.is_cancelled() && !matches!(self.behaviour, Behaviour::Blocks(_))
    }
}

impl Process {
    pub(super) fn new(plan: &Plan, place: usize, generation: u32, now: Instant) -> Self {
        let name: Arc<str> = format!("w{place}.{generation}").into();
        let mut dispatch = Dispatch::default();
        let settings = || Settings {
            worker: name.clone(),
            retry: plan.retry,
            after_dead_letter: plan.after_dead_letter,
            destination: Arc::new(Place { outside: plan.outside }),
            options: plan.options,
            effect_time: plan.options.timeout(),
            poll: plan.options.lease,
            every: plan.every,
            until: Until::Stopped,
            numbered_from: 0,
        };
        (0..plan.subscriptions).for_each(|index| dispatch.begin(index, Core::new(settings(), 0, now)));
        Self {
            generation,
            dispatch,
            attempts: Vec::new(),
            jobs: vec![VecDeque::new(); plan.subscriptions],
            known_losses: 0,
            frozen_until: now,
            wakes_at: None,
            settling: vec![0; plan.subscriptions],
            left: plan.subscriptions,
            acts: (now, 0),
            name,
        }
    }

    /// How many more tasks fit between it and the worker of a subscription.
    pub(super) fn room(&self, plan: &Plan, subscription: usize) -> usize {
        let waiting = self.attempts_of(subscription).filter(|attempt| attempt.began_at.is_none()).count();
        plan.options.concurrency.saturating_sub(waiting)
    }

    pub(super) fn attempts_of(&self, subscription: usize) -> impl Iterator<Item = &Running> + Clone {
        self.attempts.iter().filter(move |attempt| attempt.subscription == subscription)
    }

    /// It acts once more; not for ever at the same moment.
    pub(super) fn acts(&mut self, now: Instant) {
        let (moment, times) = &mut self.acts;
        if *moment != now {
            (*moment, *times) = (now, 0);
        }
        *times += 1;
        assert!(*times < 500, "{} does not come to rest", self.name);
    }
}
