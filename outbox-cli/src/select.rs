//! Options that several commands have.

use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::Args;
use outbox_core::{check_name, check_subscription_name};
use outbox_seaorm::By;

/// Who changes something, and why: for the audit.
#[derive(Args)]
pub(crate) struct Who {
    /// Who does it, for the audit. Defaults to the user who is logged in.
    #[arg(long)]
    actor: Option<String>,
    /// Why, for the audit.
    #[arg(long)]
    reason: Option<String>,
}

impl Who {
    pub(crate) fn by(&self) -> By {
        let user = || std::env::var("USER").ok().filter(|user| !user.is_empty());
        let actor = self.actor.clone().or_else(user).unwrap_or_else(|| "operator".to_owned());
        let by = By::new(&actor);
        match &self.reason {
            Some(reason) => by.reason(reason),
            None => by,
        }
    }
}

/// A time, or how long ago.
pub(crate) fn time(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return Ok(time.with_timezone(&Utc));
    }
    let ago = duration(text).ok().and_then(|ago| chrono::Duration::from_std(ago).ok());
    let time = ago.and_then(|ago| Utc::now().checked_sub_signed(ago));
    time.ok_or_else(|| "write a time as 2026-01-31T12:00:00Z, or how long ago it was: 90s, 15m, 2h, 7d".to_owned())
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let seconds = |text: &str, each: u64| text.parse::<u64>().ok().and_then(|count| count.checked_mul(each));
    let units = [("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)];
    let found = units.iter().find_map(|(unit, each)| text.strip_suffix(unit).and_then(|count| seconds(count, *each)));
    found.map(Duration::from_secs).ok_or_else(|| "write a length of time as 90s, 15m, 2h or 7d".to_owned())
}

/// An event type, aggregate type or kind of actor.
pub(crate) fn name(text: &str) -> Result<String, String> {
    check_name("it", text)
        .map(|()| text.to_owned())
        .map_err(|_| "a name has 1 to 128 of the characters A-Z, a-z, 0-9, '_', '.', ':', '/' and '-'".to_owned())
}

/// The name of a subscription.
pub(crate) fn subscription(text: &str) -> Result<String, String> {
    check_subscription_name(text)
        .map(|()| text.to_owned())
        .map_err(|_| "a subscription has 1 to 64 of the characters a-z, 0-9, '_', '.' and '-'".to_owned())
}

pub(crate) fn no_subscription(name: &str) -> String {
    format!("there is no subscription {name:?}; `outbox subscriptions` lists them")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_of_time_have_a_unit() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604_800), ("0s", 0)] {
            assert_eq!(duration(text).unwrap().as_secs(), seconds);
        }
        for bad in ["", "5", "d", "-1d", "1.5h", "1w", "99999999999999999999d", "999999999999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(time("2026-01-31T12:00:00Z").is_ok() && time("2h").is_ok());
        assert!(time("yesterday").is_err() && time("99999999999999d").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_time_or_refused(
            text in prop_oneof![
                any::<String>(),
                "[+-]?[0-9]{1,22}[smhdw]?",
                "[0-9]{1,6}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\\.[0-9]{0,12})?(Z|[+-][0-9]{2}:[0-9]{2})",
            ],
        ) {
            if let Ok(length) = duration(&text) {
                let (count, unit) = text.split_at(text.len() - 1);
                let each = match unit { "s" => 1, "m" => 60, "h" => 3600, _ => 86_400 };
                prop_assert_eq!(Some(length.as_secs()), count.parse::<u64>().unwrap().checked_mul(each));
            }
            if let Ok(time) = time(&text) {
                // It can be written again.
                prop_assert!(!time.to_rfc3339().is_empty());
            }
        }
    }
}
