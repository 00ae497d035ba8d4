use std::{str::FromStr, time::Duration};

use axum::http::StatusCode;
use serde::Deserialize;

/// What `POST /op` does besides writing its order and pushing its events.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum Mode {
    Ok,
    Status(StatusCode),
    Rollback200,
    Commit409,
    Panic,
    PanicBefore,
    SleepBefore(Duration),
    SleepAfter(Duration),
    Swallow,
    SwallowLast,
    SavepointOk,
    SavepointRollback,
    SavepointError,
    SpawnHold(Duration),
    PushLate(Duration),
    Stream,
    StreamWrite,
    OtherPool,
    OnlyEvents,
    OnlyRead,
    Many(u32),
    Big(usize),
    Raw,
    Deferred,
    Delay(Duration),
    Priority(i16),
}

#[derive(Debug, PartialEq, thiserror::Error)]
pub(crate) enum InvalidMode {
    #[error("there is no mode {0:?}")]
    Unknown(String),
    #[error("the mode {mode:?} needs {expected} after a colon, not {value:?}")]
    Value { mode: &'static str, expected: &'static str, value: String },
}

impl FromStr for Mode {
    type Err = InvalidMode;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, value) = text.split_once(':').unwrap_or((text, ""));
        let milliseconds =
            |mode| number(mode, "a number of milliseconds", value).map(|ms: u32| Duration::from_millis(ms.into()));
        Ok(match name {
            "status" => Self::Status(status(value)?),
            "sleep_before" => Self::SleepBefore(milliseconds("sleep_before")?),
            "sleep_after" => Self::SleepAfter(milliseconds("sleep_after")?),
            "spawn_hold" => Self::SpawnHold(milliseconds("spawn_hold")?),
            "push_late" => Self::PushLate(milliseconds("push_late")?),
            "delay" => Self::Delay(milliseconds("delay")?),
            "many" => Self::Many(number("many", "a number of events", value)?),
            "big" => Self::Big(number("big", "a number of bytes", value)?),
            "priority" => Self::Priority(number("priority", "a number from -32768 to 32767", value)?),
            _ => match text {
                "ok" => Self::Ok,
                "rollback_200" => Self::Rollback200,
                "commit_409" => Self::Commit409,
                "panic" => Self::Panic,
                "panic_before" => Self::PanicBefore,
                "swallow" => Self::Swallow,
                "swallow_last" => Self::SwallowLast,
                "savepoint_ok" => Self::SavepointOk,
                "savepoint_rollback" => Self::SavepointRollback,
                "savepoint_error" => Self::SavepointError,
                "stream" => Self::Stream,
                "stream_write" => Self::StreamWrite,
                "other_pool" => Self::OtherPool,
                "only_events" => Self::OnlyEvents,
                "only_read" => Self::OnlyRead,
                "raw" => Self::Raw,
                "deferred" => Self::Deferred,
                _ => return Err(InvalidMode::Unknown(text.to_owned())),
            },
        })
    }
}

fn number<T: FromStr>(mode: &'static str, expected: &'static str, value: &str) -> Result<T, InvalidMode> {
    value.parse().map_err(|_| InvalidMode::Value { mode, expected, value: value.to_owned() })
}

/// A status that can end a request: the other ones below 200 announce another response.
fn status(value: &str) -> Result<StatusCode, InvalidMode> {
    let expected = "101 or a number from 200 to 999";
    let status: u16 = number("status", expected, value)?;
    match StatusCode::from_u16(status) {
        Ok(status) if status == StatusCode::SWITCHING_PROTOCOLS || !status.is_informational() => Ok(status),
        _ => Err(InvalidMode::Value { mode: "status", expected, value: value.to_owned() }),
    }
}

impl TryFrom<String> for Mode {
    type Error = InvalidMode;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_has_a_value_where_it_needs_one() {
        assert_eq!("ok".parse(), Ok(Mode::Ok));
        assert_eq!("status:404".parse(), Ok(Mode::Status(StatusCode::NOT_FOUND)));
        assert_eq!("delay:1500".parse(), Ok(Mode::Delay(Duration::from_millis(1500))));
        assert_eq!("priority:-3".parse(), Ok(Mode::Priority(-3)));
        for bad in ["", "ok:1", "okay", "status", "status:100", "status:1000", "delay:soon", "big:-1", "priority:40000"]
        {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
    }
}
