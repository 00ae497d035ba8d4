use http::{HeaderMap, request::Parts};
use outbox_core::{Context, MAX_TRACESTATE_BYTES, check_id};
use uuid::Uuid;

/// The application's own way to read the context of a request.
pub(crate) type Read = dyn Fn(&Parts) -> Context + Send + Sync;

pub(crate) fn of_request(parts: &Parts, read: Option<&Read>) -> Context {
    let mut context = of_headers(&parts.headers);
    if let Some(read) = read {
        context.lay_over(read(parts));
    }
    if let Some(own) = parts.extensions.get::<Context>() {
        context.lay_over(own.clone());
    }
    context.correlation_id.get_or_insert_with(|| Uuid::now_v7().to_string());
    context
}

/// What a layer inside another one adds. Headers, and an extension that the outer layer has `seen`, are in the unit of
/// work already, and what was set there since then is newer.
pub(crate) fn of_inner(parts: &Parts, read: Option<&Read>, seen: Option<&Context>) -> Context {
    let mut context = read.map(|read| read(parts)).unwrap_or_default();
    if let Some(own) = parts.extensions.get::<Context>().filter(|own| Some(*own) != seen) {
        context.lay_over(own.clone());
    }
    context
}

fn of_headers(headers: &HeaderMap) -> Context {
    let mut context = Context::default();
    context.correlation_id = id(headers, "x-correlation-id").or_else(|| id(headers, "x-request-id"));
    context.traceparent = traceparent(headers);
    context.tracestate = context.traceparent.as_ref().and_then(|_| tracestate(headers));
    context
}

fn id(headers: &HeaderMap, name: &'static str) -> Option<String> {
    let id = headers.get(name)?.to_str().ok()?;
    check_id(name, id).is_ok().then(|| id.to_owned())
}

/// Two of them are as good as none: which one is right cannot be known.
fn traceparent(headers: &HeaderMap) -> Option<String> {
    let mut values = headers.get_all("traceparent").iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let value = value.to_str().ok()?;
    is_traceparent(value).then(|| value.to_owned())
}

/// `version-trace_id-parent_id-flags` in lower-case hexadecimal; a version after 00 may add more behind a dash.
fn is_traceparent(value: &str) -> bool {
    let mut parts = value.splitn(5, '-');
    let mut hex = |length: usize| {
        let part = parts.next()?;
        let digits = |part: &str| part.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
        (part.len() == length && digits(part)).then_some(part)
    };
    let (Some(version), Some(trace), Some(parent), Some(_flags)) = (hex(2), hex(32), hex(16), hex(2)) else {
        return false;
    };
    let zero = |id: &str| id.bytes().all(|c| c == b'0');
    let more = parts.next().is_some();
    version != "ff" && !zero(trace) && !zero(parent) && (version != "00" || !more) && value.len() <= 255
}

/// Several headers are one list, in their order. A longer one than W3C asks for is dropped, not cut.
fn tracestate(headers: &HeaderMap) -> Option<String> {
    let values =
        headers.get_all("tracestate").iter().map(|value| value.to_str()).collect::<Result<Vec<_>, _>>().ok()?;
    let list = values.join(",");
    (1..=MAX_TRACESTATE_BYTES).contains(&list.len()).then_some(list)
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request};
    use proptest::prelude::*;

    use super::*;

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn parts(headers: &[(&'static str, &str)]) -> Parts {
        let mut request = Request::new(());
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        request.into_parts().0
    }

    #[test]
    fn a_traceparent_has_the_shape_of_w3c() {
        assert!(is_traceparent(TRACE));
        assert!(is_traceparent("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future-holds"));
        for bad in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0af7651916cd43dd8448eb211c80319g-b7ad6b7169203331-01",
        ] {
            assert!(!is_traceparent(bad), "{bad}");
        }
    }

    #[test]
    fn the_request_id_stands_in_for_a_bad_correlation_id() {
        let long = "x".repeat(256);
        let context = of_request(&parts(&[("x-correlation-id", &long), ("x-request-id", "r-1")]), None);
        assert_eq!(context.correlation_id.as_deref(), Some("r-1"));
    }

    #[test]
    fn without_any_id_the_correlation_id_is_a_new_uuid() {
        let id = of_request(&parts(&[]), None).correlation_id.unwrap();
        assert_eq!(id.parse::<Uuid>().unwrap().get_version_num(), 7);
    }

    #[test]
    fn a_tracestate_needs_a_traceparent() {
        let alone = of_request(&parts(&[("tracestate", "a=1")]), None);
        assert_eq!(alone.tracestate, None);
        let both = [("traceparent", TRACE), ("tracestate", "a=1"), ("tracestate", "b=2")];
        assert_eq!(of_request(&parts(&both), None).tracestate.as_deref(), Some("a=1,b=2"));
        let long = "x".repeat(513);
        let too_long = of_request(&parts(&[("traceparent", TRACE), ("tracestate", &long)]), None);
        assert_eq!((too_long.traceparent.as_deref(), too_long.tracestate), (Some(TRACE), None));
    }

    #[test]
    fn two_traceparents_are_none() {
        assert_eq!(of_request(&parts(&[("traceparent", TRACE), ("traceparent", TRACE)]), None).traceparent, None);
    }

    #[test]
    fn the_extension_wins_over_the_function_and_the_function_over_the_headers() {
        let mut parts = parts(&[("x-correlation-id", "header"), ("traceparent", TRACE), ("tracestate", "a=1")]);
        let mut own = Context::default();
        own.tenant = Some("extension".to_owned());
        own.traceparent = Some(TRACE.replace("-01", "-00"));
        parts.extensions.insert(own);
        let read = |_: &Parts| {
            let mut context = Context::default();
            context.tenant = Some("function".to_owned());
            context.causation_id = Some("function".to_owned());
            context
        };
        let context = of_request(&parts, Some(&read));
        assert_eq!(context.tenant.as_deref(), Some("extension"));
        assert_eq!(context.causation_id.as_deref(), Some("function"));
        assert_eq!(context.correlation_id.as_deref(), Some("header"));
        assert_eq!(context.traceparent, Some(TRACE.replace("-01", "-00")));
        assert_eq!(context.tracestate, None, "belongs to another traceparent");
    }

    proptest! {
        #[test]
        fn any_headers_make_a_context_that_can_be_pushed(
            trace in prop::collection::vec(
                prop_oneof![
                    any::<Vec<u8>>(),
                    "[0-9a-f]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{2}(-[ -~]{0,300})?".prop_map(String::into_bytes),
                    "[0-9a-fA-F-]{0,80}".prop_map(String::into_bytes),
                ],
                0..3,
            ),
            state in prop::collection::vec(any::<Vec<u8>>(), 0..3),
            id in any::<Vec<u8>>(),
        ) {
            let mut request = Request::new(());
            let headers = trace.iter().map(|text| ("traceparent", text)).chain(state.iter().map(|text| ("tracestate", text)));
            for (name, text) in headers.chain([("x-correlation-id", &id)]) {
                if let Ok(value) = HeaderValue::from_bytes(text) {
                    request.headers_mut().append(name, value);
                }
            }
            let context = of_request(&request.into_parts().0, None);
            if let Some(parent) = &context.traceparent {
                prop_assert!(is_traceparent(parent) && parent.len() <= 255);
                prop_assert!(parent.as_bytes()[..55].iter().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f' | b'-')));
            }
            let events = outbox_core::Events::new(outbox_core::Limits::default(), context);
            let event = outbox_core::NewEvent::dynamic("a", "a", "1", &()).unwrap();
            prop_assert!(events.push(event).is_ok());
        }
    }
}
