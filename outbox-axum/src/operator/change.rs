use axum::{
    body::Bytes,
    extract::{FromRequest, Request},
};
use http::{
    HeaderMap, StatusCode, Uri,
    header::{CONTENT_TYPE, HOST, ORIGIN},
};
use outbox_seaorm::By;
use serde_json::Value;

use super::{fields::Fields, refusal::Refusal};

/// Who sends the request; set where the token is checked.
#[derive(Clone, Debug)]
pub(crate) struct Actor(pub(crate) String);

/// A request that changes something: JSON from the same origin, so that no other page can make a browser that is logged in
/// send it. Every handler that changes something takes one.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) fields: Fields,
    actor: Actor,
}

impl Change {
    /// For the audit: who, and the member `reason`.
    pub(crate) fn by(&self) -> Result<By, Refusal> {
        let by = By::new(&self.actor.0);
        Ok(match self.fields.text("reason")? {
            Some(reason) => by.reason(&reason),
            None => by,
        })
    }
}

impl<S: Send + Sync> FromRequest<S> for Change {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        if !is_same_origin(request.headers(), request.uri()) {
            let sentence = "this changes something, so it must come from a page of this address";
            return Err(Refusal::new(StatusCode::FORBIDDEN, sentence));
        }
        if !is_json(request.headers()) {
            let sentence = "this changes something; send it with the header content-type: application/json";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, sentence));
        }
        let actor = request.extensions().get().cloned().unwrap_or_else(|| Actor("operator".to_owned()));
        let body = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| Refusal::new(rejection.status(), "the body is too large or ended early"))?;
        let fields = if body.is_empty() {
            Fields::default()
        } else {
            match serde_json::from_slice(&body) {
                Ok(Value::Object(values)) => Fields::new("", values),
                Ok(_) => return Err(Refusal::bad("the body must be a JSON object")),
                Err(error) => return Err(Refusal::bad(format!("the body is not JSON: {error}"))),
            }
        };
        Ok(Self { fields, actor })
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    content_type.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

/// Browsers say where a request comes from; other clients say nothing, and have the token on purpose.
pub(super) fn is_same_origin(headers: &HeaderMap, uri: &Uri) -> bool {
    if let Some(site) = headers.get("sec-fetch-site") {
        return site == "same-origin" || site == "none";
    }
    let Some(origin) = headers.get(ORIGIN) else { return true };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| uri.authority().map(|authority| authority.as_str()));
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    origin.zip(host).is_some_and(|((_, origin), host)| origin.eq_ignore_ascii_case(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same_origin(headers: &[(&'static str, &str)]) -> bool {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        is_same_origin(&headers.collect(), &Uri::from_static("/x"))
    }

    #[test]
    fn a_browser_says_where_it_comes_from() {
        let host = ("host", "ops.example:3001");
        for same in [
            &[host][..],
            &[host, ("sec-fetch-site", "same-origin")],
            &[host, ("sec-fetch-site", "none")],
            &[host, ("origin", "http://ops.example:3001")],
            &[host, ("origin", "https://OPS.example:3001")],
        ] {
            assert!(same_origin(same), "{same:?}");
        }
        for other in [
            &[host, ("sec-fetch-site", "cross-site")][..],
            &[host, ("sec-fetch-site", "same-site")],
            &[host, ("sec-fetch-site", "")],
            &[host, ("sec-fetch-site", "cross-site"), ("origin", "http://ops.example:3001")],
            &[host, ("origin", "null")],
            &[host, ("origin", "http://evil.example")],
            &[host, ("origin", "http://ops.example:3001.evil.example")],
            &[("origin", "http://ops.example:3001")],
        ] {
            assert!(!same_origin(other), "{other:?}");
        }
    }
}
