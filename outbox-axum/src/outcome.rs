use axum::response::Response;
use http::{HeaderName, HeaderValue, StatusCode};
use outbox_core::error_text;
use outbox_seaorm::{CommitError, is_transient};
use sea_orm::DbErr;

use crate::{
    Error,
    error::{self, BUSY, CONFLICT, INTERNAL, refusal},
    grpc::{self, Protocol},
};

const HEADER: HeaderName = HeaderName::from_static("outbox-outcome");

const UNKNOWN: &str = "whether this was stored is not known; look before you send it again";
const TOO_OLD: &str = "this took too long and nothing of it was stored; send it faster, or less at once";

/// `UNKNOWN` of gRPC.
const GRPC_UNKNOWN: i32 = 2;

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

/// An answer of the layer itself, instead of the handler's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    sentence: &'static str,
    outcome: Outcome,
}

impl Refusal {
    /// A handler that panicked, or a service that is put together wrong.
    pub(crate) const INTERNAL: Self =
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, sentence: INTERNAL, outcome: Outcome::RolledBack };

    /// A transaction that was open for too long.
    pub(crate) const TOO_OLD: Self =
        Self { status: StatusCode::REQUEST_TIMEOUT, sentence: TOO_OLD, outcome: Outcome::RolledBack };

    const BUSY: Self = Self { status: StatusCode::SERVICE_UNAVAILABLE, sentence: BUSY, outcome: Outcome::RolledBack };

    const CONFLICT: Self = Self { status: StatusCode::CONFLICT, sentence: CONFLICT, outcome: Outcome::RolledBack };

    /// No `Retry-After`: doing it again might do it twice.
    const UNKNOWN: Self =
        Self { status: StatusCode::SERVICE_UNAVAILABLE, sentence: UNKNOWN, outcome: Outcome::Unknown };

    /// A context of the request with which nothing could be pushed.
    pub(crate) fn of_context(error: &Error) -> Self {
        let text = error_text(error);
        tracing::warn!(error = %text, "the context of an inner `OutboxLayer` was not taken");
        Self { status: error.status(), sentence: error.sentence(), outcome: Outcome::RolledBack }
    }

    pub(crate) fn of_failed_begin(error: &DbErr) -> Self {
        if is_transient(error) { Self::BUSY } else { Self::INTERNAL }
    }

    pub(crate) fn of_failed_commit(error: &CommitError) -> Self {
        match error {
            CommitError::Unknown(_) => Self::UNKNOWN,
            error if error.is_transient() => Self::BUSY,
            CommitError::Commit(error) if refusal(error) == Some(StatusCode::CONFLICT) => Self::CONFLICT,
            _ => Self::INTERNAL,
        }
    }

    pub(crate) fn answer(self, protocol: &Protocol) -> Response {
        self.outcome.mark(match (protocol, self.outcome) {
            (Protocol::Http, Outcome::Unknown) => error::answer(self.status, self.sentence),
            (Protocol::Http, _) => error::answer_or_retry(self.status, self.sentence),
            (Protocol::Grpc(content_type), Outcome::Unknown) => {
                grpc::answer(content_type.clone(), GRPC_UNKNOWN, self.sentence)
            }
            (Protocol::Grpc(content_type), _) => {
                grpc::answer(content_type.clone(), grpc::code(self.status), self.sentence)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use http::header::{CONTENT_TYPE, RETRY_AFTER};
    use sea_orm::ConnAcquireErr;

    use super::*;

    fn custom() -> DbErr {
        DbErr::Custom("text of the database".to_owned())
    }

    fn busy() -> DbErr {
        DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)
    }

    fn header<'a>(response: &'a Response, name: &HeaderName) -> Option<&'a str> {
        response.headers().get(name).and_then(|value| value.to_str().ok())
    }

    fn facts(refusal: Refusal) -> (u16, String, Option<String>) {
        let response = refusal.answer(&Protocol::Http);
        let text = |name| header(&response, name).map(str::to_owned);
        (response.status().as_u16(), text(&HEADER).unwrap(), text(&RETRY_AFTER))
    }

    fn rolled_back(status: u16, retry_after: Option<&str>) -> (u16, String, Option<String>) {
        (status, "rolled-back".to_owned(), retry_after.map(str::to_owned))
    }

    #[test]
    fn an_unknown_outcome_is_a_503_that_does_not_invite_to_repeat() {
        let refusal = Refusal::of_failed_commit(&CommitError::Unknown(custom()));
        assert_eq!(facts(refusal), (503, "unknown".to_owned(), None));
    }

    #[test]
    fn a_busy_database_is_a_503_with_a_time_to_retry_at_every_step() {
        for error in [
            CommitError::Begin(busy()),
            CommitError::Flush(busy()),
            CommitError::Commit(busy()),
            CommitError::StatementBusy,
        ] {
            assert_eq!(facts(Refusal::of_failed_commit(&error)), rolled_back(503, Some("1")), "{error}");
        }
        assert_eq!(facts(Refusal::of_failed_begin(&busy())), rolled_back(503, Some("1")));
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
            assert_eq!(facts(Refusal::of_failed_commit(&error)), rolled_back(500, None), "{error}");
        }
        assert_eq!(facts(Refusal::of_failed_begin(&custom())), rolled_back(500, None));
    }

    #[test]
    fn a_grpc_client_reads_code_and_sentence() {
        let unknown = Refusal::of_failed_commit(&CommitError::Unknown(custom()));
        for (refusal, code) in [
            (Refusal::INTERNAL, "13"),
            (Refusal::TOO_OLD, "4"),
            (Refusal::BUSY, "14"),
            (Refusal::CONFLICT, "10"),
            (unknown, "2"),
        ] {
            let response = refusal.answer(&Protocol::Grpc(HeaderValue::from_static("application/grpc-web+proto")));
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(header(&response, &CONTENT_TYPE), Some("application/grpc-web+proto"));
            assert_eq!(header(&response, &HeaderName::from_static("grpc-status")), Some(code));
            assert_eq!(header(&response, &HeaderName::from_static("grpc-message")), Some(refusal.sentence));
            assert_eq!(header(&response, &RETRY_AFTER).is_some(), code == "14");
            let needs_no_encoding = |c: u8| (0x20..0x7f).contains(&c) && c != b'%';
            assert!(refusal.sentence.bytes().all(needs_no_encoding), "{}", refusal.sentence);
        }
    }
}
