//! How many lanes to lease in advance.

use std::time::{Duration, Instant};

/// Lanes that came full within this time let more be leased in advance; if they took longer, fewer.
const FAST: Duration = Duration::from_millis(100);
const SLOW: Duration = Duration::from_millis(500);

/// How many batches are leased in advance at most, in lanes and in deliveries.
pub(crate) const MOST_AHEAD: usize = 10;

#[derive(Debug)]
pub(crate) struct Ahead {
    batch: usize,
    /// How many lanes to lease: more while they are soon done.
    lanes: usize,
    /// When the last claim that came back full began.
    full_at: Instant,
}

/// What a subscription can work on at this moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Capacity {
    /// How many deliveries may be under way.
    pub(crate) concurrency: usize,
    /// The destination is outside of this process, or was down a moment ago: it is not flooded.
    pub(crate) limited: bool,
}

impl Capacity {
    /// How many lanes to lease at least: as many as can be worked on, and as many again in advance.
    pub(crate) fn least(self) -> usize {
        2 * self.concurrency
    }
}

impl Ahead {
    pub(crate) fn new(batch: usize, now: Instant) -> Self {
        Self { batch, lanes: 0, full_at: now }
    }

    /// How many more lanes to lease, beside those that are. None before half of them are done: few large claims cost less
    /// than many small ones.
    pub(crate) fn room(&self, leased: usize, capacity: Capacity) -> usize {
        let least = capacity.least();
        let ahead = if capacity.limited { least } else { self.lanes.max(least) };
        let enough = ahead > least && leased * 2 > ahead;
        if enough { 0 } else { ahead.saturating_sub(leased) }
    }

    /// How many lanes one claim leases at most.
    pub(crate) fn most_at_once(&self) -> usize {
        self.lanes.max(self.batch)
    }

    /// How many deliveries are leased in advance at most.
    pub(crate) fn most_deliveries(&self) -> usize {
        MOST_AHEAD * self.batch
    }

    /// A claim came back full that was asked for then: the next one may be larger if this one came soon after the one
    /// before.
    pub(crate) fn came_full(&mut self, asked_at: Instant, capacity: Capacity) {
        let since = asked_at.saturating_duration_since(std::mem::replace(&mut self.full_at, asked_at));
        let (least, most) = (capacity.least(), self.most_deliveries());
        if since < FAST {
            self.lanes = (2 * self.lanes).clamp(least, most.max(least));
        } else if since > SLOW {
            self.lanes = (self.lanes / 2).max(least);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Capacity = Capacity { concurrency: 10, limited: false };

    #[test]
    fn fast_claims_grow_and_slow_ones_shrink_within_their_bounds() {
        let mut now = Instant::now();
        let mut ahead = Ahead::new(100, now);
        assert_eq!((ahead.room(0, FREE), ahead.room(15, FREE)), (20, 5));
        let mut rooms = Vec::new();
        for _ in 0..8 {
            now += FAST / 2;
            ahead.came_full(now, FREE);
            rooms.push(ahead.room(0, FREE));
        }
        assert_eq!(rooms, [20, 40, 80, 160, 320, 640, 1000, 1000]);
        now += (FAST + SLOW) / 2;
        ahead.came_full(now, FREE);
        assert_eq!(ahead.room(0, FREE), 1000);
        for _ in 0..8 {
            now += 2 * SLOW;
            ahead.came_full(now, FREE);
        }
        assert_eq!(ahead.room(0, FREE), 20);
    }

    #[test]
    fn nothing_more_is_leased_before_half_is_done() {
        let mut now = Instant::now();
        let mut ahead = Ahead::new(100, now);
        for _ in 0..3 {
            now += FAST / 2;
            ahead.came_full(now, FREE);
        }
        assert_eq!((ahead.room(41, FREE), ahead.room(40, FREE)), (0, 40));
    }

    #[test]
    fn a_destination_outside_gets_no_more_than_it_is_at_and_as_many_again() {
        let mut now = Instant::now();
        let mut ahead = Ahead::new(100, now);
        for _ in 0..8 {
            now += FAST / 2;
            ahead.came_full(now, FREE);
        }
        let limited = Capacity { concurrency: 3, limited: true };
        assert_eq!((ahead.room(0, limited), ahead.room(5, limited), ahead.room(9, limited)), (6, 1, 0));
    }
}
