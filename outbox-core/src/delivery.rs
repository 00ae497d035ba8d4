use std::{error::Error, fmt, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};

use crate::{RecordedEvent, error_text, one_line};

/// One attempt to hand one event to one destination.
///
/// A delivery may run more than once (a worker can die after the destination accepted and before that was recorded):
/// the event's id is the same each time.
#[derive(Clone)]
pub struct Delivery {
    event: Arc<RecordedEvent>,
    subscription: Arc<str>,
    attempt: u32,
    started_at: DateTime<Utc>,
}

impl Delivery {
    /// Describes attempt number `attempt` (1 for the first), which begins now by the clock of this machine.
    #[must_use]
    pub fn new(event: Arc<RecordedEvent>, subscription: Arc<str>, attempt: u32) -> Self {
        Self { event, subscription, attempt, started_at: Utc::now() }
    }

    /// The same attempt, which begins at that time. A worker gives the database's.
    #[must_use]
    pub fn starting_at(self, started_at: DateTime<Utc>) -> Self {
        Self { started_at, ..self }
    }

    /// The event.
    #[must_use]
    pub fn event(&self) -> &RecordedEvent {
        &self.event
    }

    /// The name of the subscription.
    #[must_use]
    pub fn subscription(&self) -> &str {
        &self.subscription
    }

    /// Which attempt this is: 1 for the first.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// When this attempt began, by the database's clock: for what a destination compares with its own. In a worker it is
    /// the database's time of at most some seconds ago, plus what has passed since, so a wrong clock of this machine does
    /// not matter.
    #[must_use]
    pub fn started_at(&self) -> DateTime<Utc> {
        self.started_at
    }
}

/// Says which event it is; its payload belongs in no log.
impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Delivery");
        shown.field("event", &self.event.id).field("event_type", &self.event.event_type);
        shown.field("subscription", &self.subscription).field("attempt", &self.attempt).finish()
    }
}

/// How an attempt ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The destination has the event.
    Delivered,
    /// It failed; try again after the backoff of the retry policy.
    Retry(DeliveryError),
    /// It failed for good: dead letter at once.
    Permanent(DeliveryError),
}

/// Why an attempt failed, and what that means for the next.
///
/// Any error turns into one with `?` and is tried again after the backoff. The constructors say more:
///
/// | | what it means | attempts |
/// |---|---|---|
/// | [`retry`](Self::retry), [`retry_after`](Self::retry_after) | this delivery failed; the destination may have said when to try again | one is spent |
/// | [`permanent`](Self::permanent) | another attempt cannot help | dead letter at once; of a [`Publisher`](crate::Publisher) once its destination has taken another event |
/// | [`unavailable`](Self::unavailable) | the destination answered that it has trouble of its own | one is spent, unless others fail so too |
/// | [`not_begun`](Self::not_begun) | this process could not even try | none is spent |
/// | [`unreachable`](Self::unreachable) | the destination cannot have got it | none is spent |
/// | [`gone`](Self::gone) | the destination wants nothing any more | none is spent, the subscription is paused |
///
/// What a publisher reports is judged together: when deliveries of five different keys have failed in a row, whatever the
/// errors say, and none has succeeded meanwhile, then it is about the destination, which counts as down as with
/// [`unreachable`](Self::unreachable). A handler, which runs in this process, is believed.
///
/// ```
/// use outbox_core::DeliveryError;
///
/// fn send(mail: &str) -> Result<(), DeliveryError> {
///     let address: std::net::Ipv4Addr = mail.parse()?; // tried again
///     if address.is_broadcast() {
///         return Err(DeliveryError::permanent("no broadcasts"));
///     }
///     Ok(())
/// }
/// assert!(send("nowhere").unwrap_err().to_string().contains("invalid IPv4"));
/// ```
// Not an `Error` itself: that would forbid the blanket `From` that makes `?` work for every error.
#[derive(Debug)]
pub struct DeliveryError {
    message: String,
    reason: Reason,
    retry_after: Option<Duration>,
}

/// What an error is about: this delivery, or its destination as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// This delivery failed; another attempt may succeed.
    Failed,
    /// This delivery will never succeed.
    Permanent,
    /// The destination has trouble of its own. When many deliveries in a row fail so, it counts as down.
    Unavailable,
    /// The destination is down: nothing can reach it.
    Unreachable,
    /// The destination is gone for good.
    Gone,
    /// This process could not begin the attempt, which says nothing about event or destination.
    NotBegun,
}

/// Longest error text that is kept, in bytes.
const MAX_MESSAGE_BYTES: usize = 2048;

impl DeliveryError {
    /// An error after which the delivery is tried again.
    #[must_use]
    pub fn retry(message: impl Into<String>) -> Self {
        Self { message: bounded(message.into()), reason: Reason::Failed, retry_after: None }
    }

    /// An error after which the delivery is tried again, no earlier than `after` from now.
    #[must_use]
    pub fn retry_after(after: Duration, message: impl Into<String>) -> Self {
        Self::retry(message).no_earlier(after)
    }

    /// An error that another attempt cannot mend: dead letter at once.
    ///
    /// From a publisher it is only believed when the destination has taken an event of another key after this one was
    /// refused: a destination that is being deployed, or whose credentials have expired, refuses everything for good. Until
    /// then the event is tried again as with [`retry`](Self::retry).
    #[must_use]
    pub fn permanent(message: impl Into<String>) -> Self {
        Self { reason: Reason::Permanent, ..Self::retry(message) }
    }

    /// The destination has trouble that is not about this event: overloaded, in maintenance, too slow. When five
    /// deliveries of different keys fail so in a row it counts as down, as with [`unreachable`](Self::unreachable).
    #[must_use]
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { reason: Reason::Unavailable, ..Self::retry(message) }
    }

    /// The destination could not be reached, so it has not seen the event. Its circuit opens: no attempt is spent, no
    /// process delivers to it for a while, then one delivery finds out whether it is back.
    #[must_use]
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self { reason: Reason::Unreachable, ..Self::retry(message) }
    }

    /// The destination wants no events any more. The subscription is paused, for an operator to remove or resume it;
    /// nothing is lost.
    #[must_use]
    pub fn gone(message: impl Into<String>) -> Self {
        Self { reason: Reason::Gone, ..Self::retry(message) }
    }

    /// This process could not begin the attempt: it has no file descriptors left, for example. No attempt is spent, and the
    /// destination is not taken to be down.
    #[must_use]
    pub fn not_begun(message: impl Into<String>) -> Self {
        Self { reason: Reason::NotBegun, ..Self::retry(message) }
    }

    /// The same, no earlier than `after` from now.
    #[must_use]
    pub fn no_earlier(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// The text that operators see: the error and its causes, at most 2 KiB, in [one line](one_line).
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether another attempt cannot help.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.reason == Reason::Permanent
    }

    /// What the error is about.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// The shortest wait the destination asked for.
    #[must_use]
    pub fn wait(&self) -> Option<Duration> {
        self.retry_after
    }
}

impl fmt::Display for DeliveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: Error> From<E> for DeliveryError {
    fn from(error: E) -> Self {
        Self::retry(error_text(&error))
    }
}

impl From<Result<(), DeliveryError>> for Outcome {
    fn from(result: Result<(), DeliveryError>) -> Self {
        match result {
            Ok(()) => Self::Delivered,
            Err(error) if error.is_permanent() => Self::Permanent(error),
            Err(error) => Self::Retry(error),
        }
    }
}

fn bounded(message: String) -> String {
    let mut message = one_line(message);
    if message.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES - 4).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the mail was not sent")]
    struct Outer(#[source] std::num::ParseIntError);

    #[test]
    fn an_error_keeps_its_causes() {
        let error = DeliveryError::from(Outer("x".parse::<i32>().unwrap_err()));
        assert_eq!(error.message(), "the mail was not sent: invalid digit found in string");
        assert!(!error.is_permanent());
    }

    #[test]
    fn the_text_is_bounded_and_storable() {
        let error = DeliveryError::retry(format!("\0{}", "ü".repeat(4000)));
        assert!(error.message().len() <= MAX_MESSAGE_BYTES, "{}", error.message().len());
        assert!(error.message().ends_with('…') && !error.message().contains('\0'));
    }

    #[test]
    fn a_text_of_a_destination_cannot_forge_a_line_of_the_log() {
        let text = "no\n2026-01-01T00:00:00Z  INFO all is well";
        for error in [DeliveryError::retry(text), DeliveryError::gone(text), std::io::Error::other(text).into()] {
            assert_eq!(error.message(), r"no\n2026-01-01T00:00:00Z  INFO all is well");
        }
    }

    #[test]
    fn the_outcome_follows_the_error() {
        assert!(matches!(Outcome::from(Ok(())), Outcome::Delivered));
        assert!(matches!(Outcome::from(Err(DeliveryError::retry("x"))), Outcome::Retry(_)));
        assert!(matches!(Outcome::from(Err(DeliveryError::permanent("x"))), Outcome::Permanent(_)));
    }
}
