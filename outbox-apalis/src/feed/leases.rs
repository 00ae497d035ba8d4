//! When leases are renewed, and whether they are in doubt.

use std::time::{Duration, Instant};

#[derive(Debug)]
pub(crate) struct Leases {
    lease: Duration,
    guard_at: Instant,
    renew_at: Instant,
    /// It is time, and nobody has asked for them yet.
    renews: bool,
    /// How many connections were lost, and how many had been when all leases were there. After another loss nothing begins
    /// before they are checked: a crash of the server takes back what routing had leased a moment before, and another
    /// worker may have got it.
    losses: u64,
    checked: u64,
}

impl Leases {
    pub(crate) fn new(lease: Duration, losses: u64, now: Instant) -> Self {
        Self { lease, guard_at: now, renew_at: now, renews: false, losses, checked: losses }
    }

    /// When to look at the ends of leases and attempts next.
    pub(crate) fn guard_at(&self) -> Instant {
        self.guard_at
    }

    /// Looks at them now, if it is time. After a third of a lease they are renewed, if there are any.
    pub(crate) fn guards(&mut self, any: bool, now: Instant) -> bool {
        let due = self.guard_at <= now;
        if due {
            // In step with those that have begun at the same time: their leases are renewed together.
            let tenth = self.lease / 10;
            self.guard_at += tenth;
            if self.guard_at <= now {
                self.guard_at = now + tenth;
            }
            self.renews = any && self.renew_at <= now;
        }
        due
    }

    /// Whether to renew all now.
    pub(crate) fn renews(&mut self, now: Instant) -> bool {
        let renews = std::mem::take(&mut self.renews);
        if renews {
            self.renew_at = now + self.lease / 3;
        }
        renews
    }

    /// Some were not renewed: they are when ends are looked at next.
    pub(crate) fn renew_again(&mut self, now: Instant) {
        self.renew_at = now;
    }

    /// So many connections were lost until now.
    pub(crate) fn lost_connections(&mut self, losses: u64) {
        self.losses = losses;
    }

    pub(crate) fn losses(&self) -> u64 {
        self.losses
    }

    /// Whether a connection was lost, and with it perhaps leases.
    pub(crate) fn are_in_doubt(&self) -> bool {
        self.checked != self.losses
    }

    /// All leases were checked after so many losses.
    pub(crate) fn checked(&mut self, losses: u64) {
        self.checked = losses;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_renewed_after_a_third_of_their_time_and_at_once_where_that_failed() {
        let (now, lease) = (Instant::now(), Duration::from_secs(30));
        let mut leases = Leases::new(lease, 0, now);
        let renews = |leases: &mut Leases, tenths| {
            let now = now + tenths * lease / 10;
            leases.guards(true, now) && leases.renews(now)
        };
        assert_eq!(
            [0, 1, 2, 3, 4, 5, 6, 7].map(|tenths| renews(&mut leases, tenths)).map(u8::from),
            [1, 0, 0, 0, 1, 0, 0, 0]
        );
        leases.renew_again(now + 7 * lease / 10);
        assert!(renews(&mut leases, 8));
        assert!(leases.guards(false, now + 2 * lease) && !leases.renews(now + 2 * lease), "there are none");
    }

    #[test]
    fn ends_are_looked_at_ten_times_a_lease() {
        let (now, lease) = (Instant::now(), Duration::from_secs(30));
        let mut leases = Leases::new(lease, 0, now);
        assert!(leases.guards(true, now) && !leases.guards(true, now + lease / 11));
        assert!(leases.guards(true, now + lease / 10));
        assert_eq!(leases.guard_at(), now + lease / 5);
    }

    #[test]
    fn another_loss_while_leases_are_checked_leaves_them_in_doubt() {
        let mut leases = Leases::new(Duration::from_secs(30), 7, Instant::now());
        assert!(!leases.are_in_doubt());
        leases.lost_connections(8);
        assert!(leases.are_in_doubt());
        leases.lost_connections(9);
        leases.checked(8);
        assert!(leases.are_in_doubt());
        leases.checked(9);
        assert!(!leases.are_in_doubt());
    }
}
