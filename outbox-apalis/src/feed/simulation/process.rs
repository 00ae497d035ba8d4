//! A worker's process: its core, and the attempts that are under way in it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    effects::{Behaviour, Place},
    plan::Plan,
};
use crate::{
    assignment::Until,
    feed::core::{Core, Settings, Start},
};

pub(super) struct Process {
    pub(super) name: Arc<str>,
    /// Another one for each process at this place.
    pub(super) generation: u32,
    pub(super) core: Core,
    pub(super) attempts: Vec<Running>,
    /// How many connections it has lost.
    pub(super) losses: u64,
    /// It stands still until then.
    pub(super) frozen_until: Instant,
    /// When it looks at the time next.
    pub(super) wakes_at: Option<Instant>,
    /// How many results are being stored.
    pub(super) settling: usize,
    /// It has stopped as it was told.
    pub(super) is_over: bool,
    /// How often it has acted at this moment.
    pub(super) acts: (Instant, u32),
}

/// An attempt that was handed out.
pub(super) struct Running {
    pub(super) id: u64,
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
        let settings = Settings {
            worker: name.clone(),
            retry: plan.retry,
            after_dead_letter: plan.after_dead_letter,
            destination: Arc::new(Place { outside: plan.outside }),
            options: plan.options,
            effect_time: plan.options.timeout(),
            poll: plan.options.lease,
            pace: plan.pace,
            until: Until::Stopped,
        };
        Self {
            name,
            generation,
            core: Core::new(settings, 0, now),
            attempts: Vec::new(),
            losses: 0,
            frozen_until: now,
            wakes_at: None,
            settling: 0,
            is_over: false,
            acts: (now, 0),
        }
    }

    /// How many more tasks fit between it and its worker.
    pub(super) fn room(&self, plan: &Plan) -> usize {
        let waiting = self.attempts.iter().filter(|attempt| attempt.began_at.is_none()).count();
        plan.options.concurrency.saturating_sub(waiting)
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
