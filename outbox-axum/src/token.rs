use std::{fmt, io, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, header::AUTHORIZATION};
use subtle::ConstantTimeEq;

/// Shortest token, in bytes. A shorter one can be found by trying.
const MIN_TOKEN_BYTES: usize = 16;

/// A token that could never be sent, or that could be guessed.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the operator token must have at least 16 bytes, and neither white space nor control characters")]
#[non_exhaustive]
pub struct InvalidToken;

/// Makes a token for [`Operator`](crate::Operator): 26 lower-case letters and digits, 130 bits from the operating
/// system's randomness. For an application that starts without one, and shows it once.
///
/// ```
/// let token = outbox_axum::random_token()?;
/// assert_eq!(token.len(), 26);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
///
/// If the operating system gives no randomness. There is no second-best source: a token that can be computed is none.
pub fn random_token() -> io::Result<String> {
    // Each byte chooses one of 32, so none is chosen more often than another.
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 26];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect())
}

/// The secret of the operators.
#[derive(Clone)]
pub(crate) struct Token(Arc<str>);

impl Token {
    pub(crate) fn new(token: String) -> Result<Self, InvalidToken> {
        if token.len() < MIN_TOKEN_BYTES || token.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(InvalidToken);
        }
        Ok(Self(token.into()))
    }

    /// Who the request is from, if it carries the token: as bearer, or as the password of any user.
    pub(crate) fn user(&self, headers: &HeaderMap) -> Option<String> {
        let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
        let (scheme, credentials) = value.trim_ascii().split_once(' ')?;
        let credentials = credentials.trim_ascii_start();
        let nobody = || "operator".to_owned();
        if scheme.eq_ignore_ascii_case("bearer") {
            return self.is(credentials.as_bytes()).then(nobody);
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let decoded = BASE64_STANDARD.decode(credentials).ok()?;
            let colon = decoded.iter().position(|byte| *byte == b':')?;
            let user = String::from_utf8_lossy(&decoded[..colon]).into_owned();
            return self.is(&decoded[colon + 1..]).then(|| if user.is_empty() { nobody() } else { user });
        }
        None
    }

    /// Takes the same time wherever the first difference is; only the length shows.
    fn is(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(authorization: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        Token::new("se:cret-of-operators".to_owned()).unwrap().user(&headers)
    }

    fn accepts(authorization: &str) -> bool {
        user(authorization).is_some()
    }

    fn basic(text: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(text))
    }

    #[test]
    fn bearer_and_the_password_of_any_user_are_accepted() {
        assert!(accepts("Bearer se:cret-of-operators"));
        assert!(accepts("bearer  se:cret-of-operators"));
        assert!(accepts(&basic("anyone:se:cret-of-operators")));
        assert!(accepts(&basic(":se:cret-of-operators")));
    }

    #[test]
    fn who_logs_in_by_name_is_known_by_it() {
        assert_eq!(user(&basic("anna:se:cret-of-operators")).as_deref(), Some("anna"));
        assert_eq!(user(&basic(":se:cret-of-operators")).as_deref(), Some("operator"));
        assert_eq!(user("Bearer se:cret-of-operators").as_deref(), Some("operator"));
    }

    #[test]
    fn everything_else_is_refused() {
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer se:cret-of-operator",
            "Bearer se:cret-of-operators2",
            "se:cret-of-operators",
            "Digest se:cret-of-operators",
            "Basic ?",
        ] {
            assert!(!accepts(bad), "{bad}");
        }
        assert!(!accepts(&basic("se:cret-of-operators")));
        assert!(!accepts(&basic("se:cret-of-operators:")));
        assert!(!accepts(&basic("anyone")));
        assert_eq!(Token::new("x".repeat(16)).unwrap().user(&HeaderMap::new()), None);
    }

    #[test]
    fn a_token_that_cannot_be_sent_is_refused() {
        for bad in ["a b", "a\n", "a\0"] {
            assert!(Token::new(format!("{bad}{}", "x".repeat(16))).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_token_that_is_found_by_trying_is_refused() {
        for short in ["", "x", "fifteen-bytes-x"] {
            let error = Token::new(short.to_owned()).unwrap_err().to_string();
            assert!(error.contains("at least 16 bytes"), "{error}");
        }
        assert!(Token::new("sixteen-bytes-xx".to_owned()).is_ok());
    }

    #[test]
    fn a_random_token_can_be_used_and_comes_once() {
        let tokens: std::collections::HashSet<String> = (0..1000).map(|_| random_token().unwrap()).collect();
        assert_eq!(tokens.len(), 1000);
        assert!(tokens.into_iter().all(|token| Token::new(token).is_ok()));
    }

    #[test]
    fn a_seed_that_somebody_guessed_tells_no_random_token() {
        let of_the_seed = || {
            fastrand::seed(7);
            (random_token().unwrap(), fastrand::u64(..))
        };
        let (first, second) = (of_the_seed(), of_the_seed());
        assert!(first.0 != second.0 && first.1 == second.1, "{first:?} {second:?}");
    }

    #[test]
    fn debug_does_not_show_the_token() {
        assert_eq!(format!("{:?}", Token::new("secret-of-operators".to_owned()).unwrap()), "Token(…)");
    }
}
