//! What the layer has to know of gRPC: how a request is recognized, and where status and message stand.

use axum::{body::Body, response::Response};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{CONTENT_TYPE, RETRY_AFTER},
};

const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// How the client of a request reads an answer.
#[derive(Clone, Debug)]
pub(crate) enum Protocol {
    Http,
    /// gRPC or gRPC-Web, with the content type of the request.
    Grpc(HeaderValue),
}

impl Protocol {
    pub(crate) fn of(request: &HeaderMap) -> Self {
        match request.get(CONTENT_TYPE) {
            Some(content_type) if content_type.as_bytes().starts_with(b"application/grpc") => {
                Self::Grpc(content_type.clone())
            }
            _ => Self::Http,
        }
    }
}

/// Whether a response is nothing but an error: its status stands in the headers. One in the trailers comes too late.
pub(crate) fn is_error(response: &HeaderMap) -> bool {
    response.get(STATUS).is_some_and(|status| status != "0")
}

/// The code that says the same as a status: of 500 `INTERNAL`, of 503 `UNAVAILABLE`, and so on.
pub(crate) fn code(status: StatusCode) -> i32 {
    match status {
        StatusCode::UNPROCESSABLE_ENTITY => 3,
        StatusCode::REQUEST_TIMEOUT => 4,
        StatusCode::PAYLOAD_TOO_LARGE => 8,
        StatusCode::CONFLICT => 10,
        StatusCode::SERVICE_UNAVAILABLE => 14,
        _ => 13,
    }
}

/// A response without a body. Its sentence is plain ASCII without `%`, as all of ours are: nothing is to be encoded.
pub(crate) fn answer(content_type: HeaderValue, code: i32, sentence: &'static str) -> Response {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, content_type);
    headers.insert(STATUS, HeaderValue::from(code));
    headers.insert(MESSAGE, HeaderValue::from_static(sentence));
    if code == self::code(StatusCode::SERVICE_UNAVAILABLE) {
        headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
