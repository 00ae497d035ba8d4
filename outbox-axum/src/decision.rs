use std::convert::Infallible;

use axum::response::{IntoResponse, IntoResponseParts, Response, ResponseParts};
use http::StatusCode;

use crate::grpc;

/// Whether a response commits, when its status does not say it.
///
/// GraphQL reports errors inside a 200; a refused login answers 401 and counts the attempt. Part of the response, like a
/// header; a middleware puts it into the response's extensions. Overrides the status, never a failure: a transaction
/// with a failed statement does not commit.
///
/// gRPC needs none as long as the error is the whole response: a `grpc-status` other than 0 in its headers rolls back.
/// One in the trailers, behind a stream of messages, comes after the commit.
///
/// ```
/// use axum::{http::StatusCode, response::IntoResponse};
/// use outbox_axum::Decision;
///
/// async fn login() -> impl IntoResponse {
///     // … counts the attempt …
///     (StatusCode::UNAUTHORIZED, Decision::Commit, "wrong password")
/// }
/// # let _ = login();
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Commits, whatever the status says. The response leaves after the commit.
    Commit,
    /// Rolls back and drops the events, whatever the status says.
    Rollback,
}

impl Decision {
    /// What the response says: its own decision, else its gRPC status, else its status.
    pub(crate) fn of(response: &mut Response) -> Self {
        match response.extensions_mut().remove() {
            Some(decided) => decided,
            None if grpc::is_error(response.headers()) => Self::Rollback,
            None => Self::by_status(response.status()),
        }
    }

    fn by_status(status: StatusCode) -> Self {
        if status == StatusCode::SWITCHING_PROTOCOLS || status.is_success() || status.is_redirection() {
            Self::Commit
        } else {
            Self::Rollback
        }
    }
}

impl IntoResponseParts for Decision {
    type Error = Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Self::Error> {
        parts.extensions_mut().insert(self);
        Ok(parts)
    }
}

impl IntoResponse for Decision {
    fn into_response(self) -> Response {
        (self, ()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_redirection_and_switching_protocols_commit() {
        for status in [101, 200, 201, 204, 299, 301, 303, 304, 399] {
            assert_eq!(Decision::by_status(StatusCode::from_u16(status).unwrap()), Decision::Commit, "{status}");
        }
        for status in [100, 103, 400, 404, 409, 422, 499, 500, 503, 599, 600, 999] {
            assert_eq!(Decision::by_status(StatusCode::from_u16(status).unwrap()), Decision::Rollback, "{status}");
        }
    }
}
