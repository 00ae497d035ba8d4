use chrono::{DateTime, Utc};
use outbox_core::{DeliveryError, RecordedEvent};
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::invalid::InvalidWebhook;

pub(super) const CONTENT_TYPE: &str = "application/cloudevents+json; charset=utf-8";

/// An event in the JSON format of CloudEvents 1.0, structured mode.
///
/// Names of extension attributes are lower-case letters and digits, at most 20, as the specification wants.
#[derive(Serialize)]
struct CloudEvent<'a> {
    id: Uuid,
    source: &'a str,
    specversion: &'static str,
    r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    time: DateTime<Utc>,
    datacontenttype: &'static str,
    dataschemaversion: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    aggregatetype: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlationid: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causationid: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tracestate: Option<&'a str>,
    data: &'a RawValue,
}

pub(super) fn body(event: &RecordedEvent, source: &str) -> Result<String, DeliveryError> {
    // Checks the syntax and copies; numbers, duplicate keys and escapes stay as they were pushed.
    let data = serde_json::from_str(&event.payload)
        .map_err(|error| DeliveryError::permanent(format!("the payload is not JSON: {error}")))?;
    let traceparent = known(event.traceparent.as_deref());
    let event = CloudEvent {
        id: event.id,
        source,
        specversion: "1.0",
        r#type: &event.event_type,
        subject: known(Some(&event.aggregate_id)),
        time: event.occurred_at,
        datacontenttype: "application/json",
        dataschemaversion: event.schema_version,
        aggregatetype: known(Some(&event.aggregate_type)),
        tenant: known(event.tenant.as_deref()),
        correlationid: known(event.correlation_id.as_deref()),
        causationid: known(event.causation_id.as_deref()),
        traceparent,
        // Means nothing without the trace that it belongs to.
        tracestate: traceparent.and_then(|_| known(event.tracestate.as_deref())),
        data,
    };
    serde_json::to_string(&event).map_err(|error| DeliveryError::permanent(format!("the event is not JSON: {error}")))
}

/// An attribute that is there must not be empty.
fn known(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

pub(super) fn source(uri: String) -> Result<String, InvalidWebhook> {
    let belongs = |byte: u8| byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte);
    if uri.is_empty() || !uri.bytes().all(belongs) { Err(InvalidWebhook::Source(uri)) } else { Ok(uri) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn event(payload: &str) -> RecordedEvent {
        RecordedEvent {
            position: 7,
            id: Uuid::from_u128(0x0198_0000_0000_7000_8000_0000_0000_0001),
            event_type: "order.placed".to_owned(),
            schema_version: 2,
            aggregate_type: "order".to_owned(),
            aggregate_id: "a/\"1\"".to_owned(),
            payload: payload.to_owned(),
            occurred_at: "2026-01-02T03:04:05.000600Z".parse().unwrap(),
            recorded_at: "2026-01-02T03:04:06Z".parse().unwrap(),
            tenant: None,
            actor: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            tracestate: None,
            tags: BTreeMap::new(),
            max_attempts: None,
        }
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let unknown = RecordedEvent { tracestate: Some("a=b".to_owned()), tenant: Some(String::new()), ..event("{}") };
        assert_eq!(
            body(&unknown, "/outbox").unwrap(),
            r#"{"id":"01980000-0000-7000-8000-000000000001","source":"/outbox","specversion":"1.0","type":"order.placed","subject":"a/\"1\"","time":"2026-01-02T03:04:05.000600Z","datacontenttype":"application/json","dataschemaversion":2,"aggregatetype":"order","data":{}}"#
        );
    }

    #[test]
    fn the_payload_is_embedded_byte_for_byte() {
        for payload in [r#"{"a": 1,  "a":9007199254740993}"#, r#""\u0000 \ud83d\ude00""#, "1E400", "null", "[ ]"] {
            let body = body(&event(payload), "/").unwrap();
            assert!(body.ends_with(&format!(",\"data\":{payload}}}")), "{body}");
        }
    }

    #[test]
    fn a_payload_that_is_not_json_is_a_permanent_error() {
        for payload in ["", "{", "{}{}", "nul"] {
            assert!(body(&event(payload), "/").unwrap_err().is_permanent(), "{payload}");
        }
    }

    #[test]
    fn a_source_is_a_uri_reference() {
        for accepted in ["/outbox", "https://shop.example.com/a?b#c", "urn:uuid:1", "todo-app"] {
            source(accepted.to_owned()).expect(accepted);
        }
        for refused in ["", "two words", "a\nb", "<x>", "größe"] {
            source(refused.to_owned()).expect_err(refused);
        }
    }
}
