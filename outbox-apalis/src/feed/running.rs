//! What is known here of an attempt that is under way.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// An attempt that was handed to the worker.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    id: u64,
    handed_out: Instant,
    time: Duration,
    /// Set when the attempt begins.
    begun: Arc<AtomicBool>,
}

impl Running {
    pub(crate) fn new(id: u64, handed_out: Instant, time: Duration) -> Self {
        Self { id, handed_out, time, begun: Arc::default() }
    }

    /// Another number for each attempt.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn begun(&self) -> &Arc<AtomicBool> {
        &self.begun
    }

    /// Whether it should have ended long ago: the attempt does not mind its time, or never got a thread.
    pub(crate) fn is_overdue(&self, now: Instant, margin: Duration) -> bool {
        now.saturating_duration_since(self.handed_out) > self.time.saturating_add(margin)
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }
}
