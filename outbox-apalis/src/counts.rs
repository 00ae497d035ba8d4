//! What became of deliveries.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What [`Worker::run_once`](crate::Worker::run_once) and [`Worker::drain`](crate::Worker::drain) did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Deliveries {
    /// Deliveries that succeeded.
    pub delivered: u64,
    /// Attempts that failed, those of dead letters included.
    pub failed: u64,
    /// Deliveries that became dead letters.
    pub dead: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) delivered: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) dead: AtomicU64,
}

impl Counts {
    pub(crate) fn until_now(&self) -> Deliveries {
        Deliveries {
            delivered: self.delivered.load(Relaxed),
            failed: self.failed.load(Relaxed),
            dead: self.dead.load(Relaxed),
        }
    }
}
