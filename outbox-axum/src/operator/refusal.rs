use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use outbox_core::error_text;
use sea_orm::DbErr;
use serde_json::json;

/// Why an operator does not get what was asked for: `{"error": sentence}`.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    sentence: String,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, sentence: impl Into<String>) -> Self {
        Self { status, sentence: sentence.into() }
    }

    /// Something of the request is not as it must be.
    pub(crate) fn bad(sentence: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, sentence)
    }

    pub(crate) fn no_subscription() -> Self {
        Self::new(StatusCode::NOT_FOUND, "there is no subscription of this name")
    }

    pub(crate) fn no_event() -> Self {
        Self::new(StatusCode::NOT_FOUND, "there is no event with this id; retention may have taken it away")
    }
}

/// What the database says goes to the log alone.
impl From<DbErr> for Refusal {
    fn from(error: DbErr) -> Self {
        tracing::error!(error = %error_text(&error), "an operator's request failed");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the database does not answer; the log of the service says why")
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.sentence }))).into_response()
    }
}
