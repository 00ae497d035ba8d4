//! What names and ids may look like, checked where they are given.

/// Longest event type, aggregate type, tag or kind of actor, in characters.
pub const MAX_NAME_LENGTH: usize = 128;

/// Longest name of a subscription, in characters.
pub const MAX_SUBSCRIPTION_NAME_LENGTH: usize = 64;

/// Longest aggregate id, tenant, actor id, tag value and the like, in bytes.
pub const MAX_ID_BYTES: usize = 255;

/// Longest W3C `tracestate`, in bytes.
pub const MAX_TRACESTATE_BYTES: usize = 512;

/// A name or id that cannot be used; the text says which and what is allowed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidName {
    /// A name with other characters than letters, digits, `_`, `.`, `:`, `/`, `-`, or of the wrong length.
    #[error(
        "{what} {name:?} is not a valid name; use 1 to 128 of the characters A-Z, a-z, 0-9, '_', '.', ':', '/' and '-'"
    )]
    Name {
        /// What was named, for example `event type`.
        what: &'static str,
        /// The name as it was given, shortened to 80 characters.
        name: String,
    },
    /// A subscription whose name has other characters than `a-z`, `0-9`, `_`, `.`, `-`, or the wrong length.
    #[error(
        "{name:?} is not a valid name of a subscription; use 1 to 64 of the characters a-z, 0-9, '_', '.' and '-': it stands in \
         URLs, metrics and Redis"
    )]
    Subscription {
        /// The name as it was given, shortened to 80 characters.
        name: String,
    },
    /// A `tracestate` that is empty, longer than [`MAX_TRACESTATE_BYTES`], or holds a NUL character.
    #[error("tracestate must have 1 to 512 bytes and no NUL character")]
    Tracestate,
    /// An id that is empty, longer than [`MAX_ID_BYTES`], or holds a NUL character.
    #[error("{what} must have 1 to 255 bytes and no NUL character")]
    Id {
        /// What was identified, for example `aggregate id`.
        what: &'static str,
    },
}

/// Checks an event type, aggregate type, tag or kind of actor: `todo.created`, `OrderCreated`, `EMBED_UPSERT`,
/// `SYSTEM.IMPORT`. Upper and lower case are different names.
///
/// # Errors
///
/// [`InvalidName::Name`] unless the name has 1 to [`MAX_NAME_LENGTH`] of the characters `A-Z`, `a-z`, `0-9`, `_`, `.`,
/// `:`, `/`, `-`.
pub fn check_name(what: &'static str, name: &str) -> Result<(), InvalidName> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b':' | b'/' | b'-');
    if (1..=MAX_NAME_LENGTH).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(InvalidName::Name { what, name: shortened(name) })
    }
}

/// Checks the name of a subscription. It stands in URLs, metrics and Redis, so less is allowed than for other names.
///
/// # Errors
///
/// [`InvalidName::Subscription`] unless the name has 1 to [`MAX_SUBSCRIPTION_NAME_LENGTH`] of the characters `a-z`,
/// `0-9`, `_`, `.`, `-`.
pub fn check_subscription_name(name: &str) -> Result<(), InvalidName> {
    let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'_' | b'.' | b'-');
    if (1..=MAX_SUBSCRIPTION_NAME_LENGTH).contains(&name.len()) && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(InvalidName::Subscription { name: shortened(name) })
    }
}

fn shortened(name: &str) -> String {
    name.chars().take(80).collect()
}

/// Checks an id that comes from outside: aggregate id, tenant, actor id, tag value.
///
/// # Errors
///
/// [`InvalidName::Id`] unless the id has 1 to [`MAX_ID_BYTES`] bytes and no NUL character, which PostgreSQL cannot store.
pub fn check_id(what: &'static str, id: &str) -> Result<(), InvalidName> {
    if (1..=MAX_ID_BYTES).contains(&id.len()) && !id.contains('\0') { Ok(()) } else { Err(InvalidName::Id { what }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_as_people_have_them() {
        for good in ["a", "todo.created", "OrderCreated", "EMBED_UPSERT", "USER", "SYSTEM.IMPORT", "shop:order/1-2"] {
            assert!(check_name("event type", good).is_ok(), "{good}");
        }
        assert!(check_name("event type", &"A".repeat(128)).is_ok());
        for bad in ["", "a b", "ü", "a*", "a\n", "a\"", "a\\b", "a?b", "a#b", "a%2Fb", "İ", &"a".repeat(129)] {
            assert!(check_name("event type", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn subscriptions_have_1_to_64_lower_case_characters() {
        for good in ["a", "mail.daily", "x_1-2", &"a".repeat(64)] {
            assert!(check_subscription_name(good).is_ok(), "{good}");
        }
        for bad in ["", "Mail", "a b", "ü", "a/b", "a:b", &"a".repeat(65)] {
            assert!(check_subscription_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bad_name_is_shown_with_what_is_allowed() {
        assert_eq!(
            check_name("event type", "Todo Created").unwrap_err().to_string(),
            "event type \"Todo Created\" is not a valid name; use 1 to 128 of the characters A-Z, a-z, 0-9, '_', '.', ':', \
             '/' and '-'"
        );
        assert_eq!(
            check_subscription_name("Mail").unwrap_err().to_string(),
            "\"Mail\" is not a valid name of a subscription; use 1 to 64 of the characters a-z, 0-9, '_', '.' and '-': it \
             stands in URLs, metrics and Redis"
        );
    }

    #[test]
    fn ids_are_bounded_and_without_nul() {
        assert!(check_id("aggregate id", "Käse 7").is_ok());
        for bad in ["", "a\0b", &"x".repeat(256)] {
            assert!(check_id("aggregate id", bad).is_err());
        }
    }
}
