use std::{
    borrow::Cow,
    cmp::Reverse,
    fmt,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, Response, StatusCode, header::RETRY_AFTER};
use http_body_util::BodyExt;
use outbox_core::DeliveryError;
use percent_encoding::percent_decode_str;
use url::Url;

/// Longest wait that a destination may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// How much of a failure's body is read, in bytes.
const READ_BYTES: usize = 1024;

/// How much of it is shown, in characters.
const SHOWN_CHARS: usize = 512;

/// Longest wait for the body of a failure: its status has said what counts.
const BODY_TIMEOUT: Duration = Duration::from_secs(1);

/// What an answer other than 2xx means for the delivery. `now` is the database's time.
pub(super) async fn failed<B>(answer: Response<B>, left: Duration, now: SystemTime, hidden: &Hidden) -> DeliveryError
where
    B: BodyExt<Data: AsRef<[u8]>> + Unpin,
{
    let (head, body) = answer.into_parts();
    let mut text = format!("the destination answered {}", head.status.as_u16());
    if head.status.is_redirection() {
        text.push_str(", and redirects are not followed");
    }
    let excerpt = excerpt(&beginning(body, left.min(BODY_TIMEOUT)).await, hidden);
    if !excerpt.is_empty() {
        text.push_str(": ");
        text.push_str(&excerpt);
    }
    let error = match head.status {
        StatusCode::GONE => return DeliveryError::gone(text),
        status if !passing(status) => return DeliveryError::permanent(text),
        status if in_trouble(status) => DeliveryError::unavailable(text),
        _ => DeliveryError::retry(text),
    };
    match wait(&head.headers, now) {
        None => error,
        Some(wait) => error.no_earlier(wait),
    }
}

/// Whether the answer is about the destination and not about the event.
fn in_trouble(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

/// Whether another attempt may end differently. What HTTP has no meaning for is taken as a destination in trouble.
fn passing(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS)
        || !(status.is_redirection() || status.is_client_error())
}

/// The wait that the destination asks for: seconds, or a date. What is neither counts as nothing said.
fn wait(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // Digits that are no number are too many.
        text.parse().map_or(MAX_RETRY_AFTER, Duration::from_secs)
    } else {
        httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// As much of the body as arrives in time, at most [`READ_BYTES`].
async fn beginning<B>(mut body: B, timeout: Duration) -> Vec<u8>
where
    B: BodyExt<Data: AsRef<[u8]>> + Unpin,
{
    let mut read = Vec::new();
    let reading = async {
        while let Some(Ok(frame)) = body.frame().await {
            if let Some(data) = frame.data_ref().map(AsRef::as_ref) {
                read.extend_from_slice(&data[..data.len().min(READ_BYTES - read.len())]);
            }
            if read.len() == READ_BYTES {
                break;
            }
        }
    };
    // Too slow is as good as ended.
    let _ = tokio::time::timeout(timeout, reading).await;
    read
}

fn excerpt(body: &[u8], hidden: &Hidden) -> String {
    let text = plain(&hidden.hide(&String::from_utf8_lossy(body)));
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// One line of text: without control characters, and without those that turn around or break what comes after.
pub(super) fn plain(text: &str) -> String {
    let unsafe_to_show = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let words = text.split(|c: char| c.is_whitespace() || unsafe_to_show(c)).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// The parts of the URL that may be secret, which destinations like to repeat in their answers.
pub(super) struct Hidden(Vec<String>);

impl Hidden {
    /// The query, its values, and the path's segments that look like a token, as they stand in the URL and decoded. What
    /// is shorter is no secret, and would tear holes into ordinary text.
    pub(super) fn of(url: &Url) -> Self {
        let query = url.query().into_iter().flat_map(|query| query.split(['&', '=']).chain([query])).map(str::to_owned);
        let values = url.query_pairs().map(|(_, value)| value.into_owned());
        let segments = url.path_segments().into_iter().flatten().filter(|segment| segment.len() >= 16);
        let segments = segments.flat_map(|segment| [segment.into(), percent_decode_str(segment).decode_utf8_lossy()]);
        let parts = query.chain(values).chain(segments.map(Cow::into_owned));
        let mut parts: Vec<String> = parts.filter(|part| part.len() >= 6).collect();
        // The longest first, so that none is left in pieces.
        parts.sort_by_key(|part| Reverse(part.len()));
        Self(parts)
    }

    fn hide(&self, text: &str) -> String {
        let mut text = self.0.iter().fold(text.to_owned(), |text, part| text.replace(part, "…"));
        // The text may have been cut off within one.
        for part in &self.0 {
            let begun = |&len: &usize| part.is_char_boundary(len) && text.ends_with(&part[..len]);
            if let Some(len) = (4..part.len()).rev().find(begun) {
                text.truncate(text.len() - len);
                text.push('…');
            }
        }
        text
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden")
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn statuses_that_may_pass_are_tried_again() {
        for passing in [101, 408, 425, 429, 500, 501, 502, 503, 504, 599, 600, 999] {
            assert!(super::passing(StatusCode::from_u16(passing).unwrap()), "{passing}");
        }
        for lasting in [300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 409, 410, 413, 422, 451, 499] {
            assert!(!super::passing(StatusCode::from_u16(lasting).unwrap()), "{lasting}");
        }
    }

    #[test]
    fn the_wait_is_seconds_or_a_date_and_an_hour_at_most() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let asked = |text: &str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
            wait(&headers, now).map(|wait| wait.as_secs())
        };
        for (text, seconds) in [
            ("0", 0),
            (" 120 ", 120),
            ("3600", 3600),
            ("3601", 3600),
            ("99999999999999999999999999", 3600),
            ("Sun, 06 Nov 1994 08:50:07 GMT", 30),
            ("Sunday, 06-Nov-94 08:50:07 GMT", 30),
            ("Sun Nov  6 08:50:07 1994", 30),
            ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
            ("Sat, 05 Nov 1994 08:49:37 GMT", 0),
            ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ] {
            assert_eq!(asked(text), Some(seconds), "{text}");
        }
        for nothing in ["", "soon", "-1", "+1", "1.5", "1 s", "0x10", "Sun, 99 Nov 1994 08:49:37 GMT"] {
            assert_eq!(asked(nothing), None, "{nothing}");
        }
        assert_eq!(wait(&HeaderMap::new(), now), None);
    }

    #[test]
    fn an_excerpt_is_one_line_of_bounded_length() {
        let none = Hidden(Vec::new());
        assert_eq!(excerpt(b"  a\r\n\tb\x1b[31m\0 c\xe2\x80\xaed \xff ", &none), "a b [31m c d \u{fffd}");
        assert_eq!(excerpt(&"ü".repeat(600).into_bytes(), &none), format!("{}…", "ü".repeat(512)));
    }

    #[test]
    fn an_excerpt_does_not_repeat_the_secrets_of_the_url() {
        let encoded = "https://h.example/hooks/aGVsbG8%2Bd29ybGQ%3D%3D/in";
        let in_the_path = Hidden::of(&Url::parse(encoded).unwrap());
        for answer in ["no hook aGVsbG8+d29ybGQ== here", "no hook aGVsbG8%2Bd29ybGQ%3D%3D here"] {
            assert_eq!(excerpt(answer.as_bytes(), &in_the_path), "no hook … here");
        }
        let url = "https://h.example/hooks/T0123456789ABCDEFGH?token=s3cr%2Bt-value&v=1&longnakedkey";
        let hidden = Hidden::of(&Url::parse(url).unwrap());
        for (answer, shown) in [
            ("no POST /hooks/T0123456789ABCDEFGH?token=s3cr%2Bt-value&v=1&longnakedkey", "no POST /hooks/…?…"),
            ("bad token s3cr+t-value", "bad token …"),
            ("token=s3cr%2Bt-value&amp;v=1", "token=…&amp;v=1"),
            ("longnakedkey", "…"),
            ("cut off: longnak", "cut off: …"),
            ("no such hook", "no such hook"),
        ] {
            assert_eq!(excerpt(answer.as_bytes(), &hidden), shown);
        }
    }

    proptest! {
        #[test]
        fn any_retry_after_is_a_wait_of_an_hour_at_most(
            text in prop_oneof![
                any::<Vec<u8>>(),
                "[0-9]{0,40}".prop_map(String::into_bytes),
                "[A-Z][a-z]{2}, [0-9]{1,3} [A-Z][a-z]{2} [0-9]{1,6} [0-9]{1,3}:[0-9]{2}:[0-9]{2} GMT"
                    .prop_map(String::into_bytes),
            ],
            now in 0..u64::from(u32::MAX),
        ) {
            if let Ok(value) = HeaderValue::from_bytes(&text) {
                let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
                let wait = wait(&HeaderMap::from_iter([(RETRY_AFTER, value)]), now);
                prop_assert!(wait.is_none_or(|wait| wait <= MAX_RETRY_AFTER), "{wait:?}");
            }
        }

        #[test]
        fn any_answer_is_one_short_line_without_the_secret(
            before in any::<Vec<u8>>(),
            after in any::<Vec<u8>>(),
            secret in "[A-Za-z0-9+=ü]{16,40}",
        ) {
            let mut url = Url::parse("https://h.example/hooks/").unwrap();
            url.path_segments_mut().unwrap().pop_if_empty().push(&secret);
            let body = [&before[..], secret.as_bytes(), &after[..]].concat();
            let shown = excerpt(&body, &Hidden::of(&url));
            prop_assert!(shown.chars().count() <= SHOWN_CHARS + 1);
            prop_assert!(!shown.contains(char::is_control) && !shown.contains('\n'), "{shown}");
            prop_assert!(!shown.contains(&secret), "{shown}");
        }
    }
}
