use axum::response::Response;
use http::{HeaderName, HeaderValue, StatusCode};
use outbox_seaorm::{CommitError, is_transient};
use sea_orm::DbErr;

use crate::error::{CONFLICT, INTERNAL, answer, busy};

const HEADER: HeaderName = HeaderName::from_static("outbox-outcome");

const UNKNOWN: &str = "whether this was stored is not known; look before you send it again";

/// How a request's transaction ended, as the client is told in a header.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    Committed,
    RolledBack,
    Unknown,
}

impl Outcome {
    pub(crate) fn mark(self, mut response: Response) -> Response {
        let value = match self {
            Self::Committed => "committed",
            Self::RolledBack => "rolled-back",
            Self::Unknown => "unknown",
        };
        response.headers_mut().insert(HEADER, HeaderValue::from_static(value));
        response
    }
}

pub(crate) fn of_panic() -> Response {
    Outcome::RolledBack.mark(answer(StatusCode::INTERNAL_SERVER_ERROR, INTERNAL))
}

pub(crate) fn of_failed_begin(error: &DbErr) -> Response {
    Outcome::RolledBack.mark(if is_transient(error) {
        busy()
    } else {
        answer(StatusCode::INTERNAL_SERVER_ERROR, INTERNAL)
    })
}

pub(crate) fn of_failed_commit(error: &CommitError) -> Response {
    match error {
        // No `Retry-After`: doing it again might do it twice.
        CommitError::Unknown(_) => Outcome::Unknown.mark(answer(StatusCode::SERVICE_UNAVAILABLE, UNKNOWN)),
        error if error.is_transient() => Outcome::RolledBack.mark(busy()),
        CommitError::Commit(error) if error.sql_err().is_some() => {
            Outcome::RolledBack.mark(answer(StatusCode::CONFLICT, CONFLICT))
        }
        _ => Outcome::RolledBack.mark(answer(StatusCode::INTERNAL_SERVER_ERROR, INTERNAL)),
    }
}

#[cfg(test)]
mod tests {
    use http::header::RETRY_AFTER;
    use sea_orm::ConnAcquireErr;

    use super::*;

    fn custom() -> DbErr {
        DbErr::Custom("text of the database".to_owned())
    }

    fn facts(response: &Response) -> (u16, &str, Option<&str>) {
        let header = |name: &HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok());
        (response.status().as_u16(), header(&HEADER).unwrap(), header(&RETRY_AFTER))
    }

    #[test]
    fn an_unknown_outcome_is_a_503_that_does_not_invite_to_repeat() {
        let response = of_failed_commit(&CommitError::Unknown(custom()));
        assert_eq!(facts(&response), (503, "unknown", None));
    }

    #[test]
    fn a_busy_database_is_a_503_with_a_time_to_retry_at_every_step() {
        let busy = || DbErr::ConnectionAcquire(ConnAcquireErr::Timeout);
        for error in [CommitError::Begin(busy()), CommitError::Flush(busy()), CommitError::Commit(busy())] {
            assert_eq!(facts(&of_failed_commit(&error)), (503, "rolled-back", Some("1")), "{error}");
        }
        assert_eq!(facts(&of_failed_begin(&busy())), (503, "rolled-back", Some("1")));
    }

    #[test]
    fn everything_else_is_a_500() {
        for error in [
            CommitError::HandleHeld,
            CommitError::StatementFailed,
            CommitError::Begin(custom()),
            CommitError::Flush(custom()),
            CommitError::Commit(custom()),
        ] {
            assert_eq!(facts(&of_failed_commit(&error)), (500, "rolled-back", None), "{error}");
        }
        assert_eq!(facts(&of_failed_begin(&custom())), (500, "rolled-back", None));
    }
}
