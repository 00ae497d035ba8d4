use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use outbox_core::{PushError, error_text};
use outbox_seaorm::{SavepointError, is_transient};
use sea_orm::{DbErr, RuntimeErr};
use serde::Serialize;

use crate::grpc;

pub(crate) const INTERNAL: &str = "the request failed; the log of the service says why";
pub(crate) const CONFLICT: &str = "this does not fit what is stored already; change the request";
pub(crate) const BUSY: &str = "the service is busy; send the request again in a moment";
const TOO_LARGE: &str = "this is more than one request may do; send less at once";
const INVALID: &str = "a value of the request is not valid; change the request";

/// What a handler answers when the database or the collector refused: `?` makes it from their errors.
///
/// | cause | status | gRPC |
/// |---|---|---|
/// | unique, foreign key or exclusion constraint violated | 409 | `ABORTED` |
/// | a value that the database cannot store: not-null or check constraint, wrong type, out of range, too long, a NUL in a text (PostgreSQL) | 422 | `INVALID_ARGUMENT` |
/// | no connection free, database busy, serialization failure, deadlock | 503 with `retry-after: 1` | `UNAVAILABLE` |
/// | event or number of events too large | 413 | `RESOURCE_EXHAUSTED` |
/// | name, tags or payload of an event not valid | 422 | `INVALID_ARGUMENT` |
/// | everything else | 500 | `INTERNAL` |
///
/// All of them roll the request back. The body is `{"error":"…"}` with a fixed sentence; what the database said goes to
/// the log alone. An application with more to say wraps it in an error type of its own. A service that answers in
/// another protocol takes [`status`](Self::status) or [`grpc_code`](Self::grpc_code), and
/// [`sentence`](Self::sentence).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database refused a statement, or could not be reached.
    #[error("a statement failed")]
    Database(#[from] DbErr),
    /// An event was not taken.
    #[error("an event was not taken")]
    Push(#[from] PushError),
    /// A statement in a savepoint failed, and the work in it answered with a success nevertheless.
    #[error("a statement in a savepoint failed and its error was ignored")]
    Savepoint,
}

impl Error {
    /// The status of the response.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Database(error) if is_transient(error) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Database(error) => refusal(error).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            Self::Push(
                PushError::PayloadTooLarge { .. } | PushError::TooManyEvents { .. } | PushError::TooManyBytes { .. },
            ) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Push(
                PushError::Name(_)
                | PushError::Payload { .. }
                | PushError::PayloadTooDeep { .. }
                | PushError::TooManyTags { .. },
            ) => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Push(_) | Self::Savepoint => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The code of a gRPC status that says the same: `tonic::Code::from(error.grpc_code())`.
    #[must_use]
    pub fn grpc_code(&self) -> i32 {
        grpc::code(self.status())
    }

    /// What the client is told: one of a few fixed sentences, without a word of the database.
    #[must_use]
    pub fn sentence(&self) -> &'static str {
        match self.status() {
            StatusCode::SERVICE_UNAVAILABLE => BUSY,
            StatusCode::CONFLICT => CONFLICT,
            StatusCode::PAYLOAD_TOO_LARGE => TOO_LARGE,
            StatusCode::UNPROCESSABLE_ENTITY => INVALID,
            _ => INTERNAL,
        }
    }
}

/// The status of a statement, or a COMMIT, that was refused because of its values.
pub(crate) fn refusal(error: &DbErr) -> Option<StatusCode> {
    let (DbErr::Exec(RuntimeErr::SqlxError(cause)) | DbErr::Query(RuntimeErr::SqlxError(cause))) = error else {
        return error.sql_err().map(|_| StatusCode::CONFLICT);
    };
    let code = cause.as_database_error()?.code()?;
    match &*code {
        // PostgreSQL: restrict, foreign key, unique, exclusion. SQLite: foreign key, primary key, unique, rowid.
        "23001" | "23503" | "23505" | "23P01" | "787" | "1555" | "2067" | "2579" => Some(StatusCode::CONFLICT),
        // PostgreSQL: not null, check; too large for an index, nested too deeply. SQLite: too big, mismatch, check,
        // not null, type of a strict table.
        "23502" | "23514" | "54000" | "54001" | "18" | "20" | "275" | "1299" | "3091" => {
            Some(StatusCode::UNPROCESSABLE_ENTITY)
        }
        // PostgreSQL: data exceptions, such as a NUL in a text, a number out of range, a text that is too long.
        code if code.len() == 5 && code.starts_with("22") => Some(StatusCode::UNPROCESSABLE_ENTITY),
        _ => None,
    }
}

impl<E: Into<Self>> From<SavepointError<E>> for Error {
    fn from(error: SavepointError<E>) -> Self {
        match error {
            SavepointError::Work(error) => error.into(),
            SavepointError::Database(error) => Self::Database(error),
            _ => Self::Savepoint,
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.status();
        if status.is_server_error() {
            tracing::error!(error = %error_text(&self), "a handler failed");
        } else {
            tracing::debug!(error = %error_text(&self), "a handler refused the request");
        }
        let mut response = answer_or_retry(status, self.sentence());
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.extensions_mut().insert(FoundItBusy);
        }
        response
    }
}

/// On a response: a statement of the handler found no connection, or the database busy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FoundItBusy;

#[derive(Serialize)]
struct Sentence {
    error: &'static str,
}

/// A response whose body is `{"error": sentence}`.
pub(crate) fn answer(status: StatusCode, sentence: &'static str) -> Response {
    (status, Json(Sentence { error: sentence })).into_response()
}

/// As [`answer`], with the time after which a busy service may be asked again.
pub(crate) fn answer_or_retry(status: StatusCode, sentence: &'static str) -> Response {
    let mut response = answer(status, sentence);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };

    use outbox_core::{Events, Limits, MAX_TAGS, NewEvent, check_name};
    use sea_orm::ConnAcquireErr;

    use super::*;

    fn pushed(limits: Limits) -> Error {
        let events = Events::new(limits, outbox_core::Context::default());
        events.push(NewEvent::dynamic("a", "a", "1", &"four").unwrap()).unwrap_err().into()
    }

    #[test]
    fn each_cause_has_its_status() {
        let closed = Events::new(Limits::default(), outbox_core::Context::default());
        let _ = closed.close();
        let closed = closed.push(NewEvent::dynamic("a", "a", "1", &()).unwrap()).unwrap_err();
        let name = check_name("event type", "Not A Name").unwrap_err();
        let payload = NewEvent::dynamic("a", "a", "1", &std::collections::HashMap::from([((), ())])).unwrap_err();
        for (error, status) in [
            (pushed(Limits::default().payload(5)), 413),
            (pushed(Limits::default().events(0)), 413),
            (pushed(Limits::default().bytes(5)), 413),
            (PushError::from(name).into(), 422),
            (PushError::TooManyTags { limit: MAX_TAGS }.into(), 422),
            (PushError::PayloadTooDeep { event_type: "a".to_owned(), limit: 1000 }.into(), 422),
            (payload.into(), 422),
            (closed.into(), 500),
            (DbErr::ConnectionAcquire(ConnAcquireErr::Timeout).into(), 503),
            (DbErr::RecordNotFound("todos".to_owned()).into(), 500),
            (SavepointError::<DbErr>::StatementFailed.into(), 500),
            (SavepointError::Work(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout)).into(), 503),
        ] {
            assert_eq!(error.status().as_u16(), status, "{error:?}");
        }
    }

    /// What is logged while `work` runs.
    fn logged(work: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Log(Arc<Mutex<Vec<u8>>>);
        impl Write for Log {
            fn write(&mut self, text: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(text);
                Ok(text.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, work);
        String::from_utf8(log.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_text_of_the_database_cannot_forge_a_line_of_the_log() {
        let text = "no\n2026-01-01T00:00:00Z  INFO all is well";
        let log = logged(|| drop(Error::from(DbErr::Custom(text.to_owned())).into_response()));
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains(r"no\n2026-01-01T00:00:00Z  INFO all is well"), "{log}");
    }
}
