//! How soon to ask again while the database is out of reach.

use std::time::Duration;

/// The longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(5);

/// How long to wait after so many failures in a row.
pub(crate) fn outage_wait(failures: u32, chance: f64) -> Duration {
    let wait = Duration::from_millis(100) * 2_u32.pow(failures.min(10));
    wait.min(LONGEST).mul_f64(chance.mul_add(0.5, 0.5))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_asked_about_less_and_less_often() {
        let waits: Vec<u128> = (1..8).map(|failures| outage_wait(failures, 1.0).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(outage_wait(1, 0.0), Duration::from_millis(100));
    }
}
