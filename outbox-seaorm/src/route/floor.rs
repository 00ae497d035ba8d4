//! A position below which no mark can appear any more.
//!
//! Under somebody's old snapshot the head of the marks' index is full of entries that nobody needs, and every walk from
//! its beginning passes over all of them. Transaction ids cannot tell where to begin: a position is drawn before its
//! transaction has one. But a writer locks the table of events before it draws a position, so: note the last position and
//! who has that lock; when these are gone, and a walk finds no mark up to the position, nothing will be there again.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

/// A walk that takes longer is worth a higher floor.
const SLOW: Duration = Duration::from_millis(5);

/// How often the writers are asked for at most.
const EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Floor {
    position: i64,
    /// A position that may become the floor, and the writers that may still be below.
    candidate: Option<(i64, HashSet<String>)>,
    asked_at: Option<Instant>,
}

impl Floor {
    pub(crate) fn position(&self) -> i64 {
        self.position
    }

    /// Whether to ask who writes at this moment: after a walk that took `walk`, and while there is a candidate.
    pub(crate) fn asks(&mut self, walk: Duration, now: Instant) -> bool {
        let due = self.asked_at.is_none_or(|at| now.duration_since(at) >= EVERY);
        let asks = due && (walk > SLOW || self.candidate.is_some());
        if asks {
            self.asked_at = Some(now);
        }
        asks
    }

    /// The writers of this moment, and the last mark. Returns a candidate whose writers are gone: it becomes the floor if a
    /// walk that begins now finds nothing up to it.
    pub(crate) fn writers(&mut self, writers: HashSet<String>, last: i64) -> Option<i64> {
        match &mut self.candidate {
            None => {
                self.candidate = (last > self.position).then_some((last, writers));
                None
            }
            Some((position, before)) => {
                before.retain(|writer| writers.contains(writer));
                before.is_empty().then_some(*position)
            }
        }
    }

    /// Whether the walk found nothing.
    pub(crate) fn walked(&mut self, empty: bool) {
        if empty
            && let Some((position, writers)) = &self.candidate
            && writers.is_empty()
        {
            self.position = *position;
            self.candidate = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writers(names: &[&str]) -> HashSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn rises_when_the_writers_of_the_note_are_gone_and_a_walk_is_empty() {
        let mut floor = Floor::default();
        assert_eq!(floor.writers(writers(&["1/2", "3/4"]), 100), None);
        // Another writer, which came later, draws higher positions.
        assert_eq!(floor.writers(writers(&["3/4", "5/6"]), 200), None);
        assert_eq!(floor.writers(writers(&["5/6"]), 300), Some(100));
        floor.walked(false);
        assert_eq!(floor.position(), 0);
        assert_eq!(floor.writers(writers(&["5/6"]), 300), Some(100));
        floor.walked(true);
        assert_eq!(floor.position(), 100);
    }

    #[test]
    fn a_writer_that_stays_keeps_it() {
        let mut floor = Floor::default();
        for _ in 0..5 {
            assert_eq!(floor.writers(writers(&["-1/77"]), 100), None);
            floor.walked(true);
        }
        assert_eq!(floor.position(), 0);
    }

    #[test]
    fn asks_once_a_second_and_only_after_a_slow_walk() {
        let (mut floor, now) = (Floor::default(), Instant::now());
        assert!(!floor.asks(Duration::from_millis(1), now));
        assert!(floor.asks(Duration::from_millis(50), now));
        assert!(!floor.asks(Duration::from_millis(50), now + Duration::from_millis(900)));
        floor.writers(writers(&[]), 7);
        assert!(floor.asks(Duration::ZERO, now + Duration::from_secs(2)));
    }
}
