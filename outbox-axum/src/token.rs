use std::{fmt, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, header::AUTHORIZATION};
use subtle::ConstantTimeEq;

/// A token that could never be sent, or that everybody could guess.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the operator token must have at least one character, and neither white space nor control characters")]
#[non_exhaustive]
pub struct InvalidToken;

/// The secret of the operators.
#[derive(Clone)]
pub(crate) struct Token(Arc<str>);

impl Token {
    pub(crate) fn new(token: String) -> Result<Self, InvalidToken> {
        if token.is_empty() || token.contains(|c: char| c.is_whitespace() || c.is_control()) {
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
        Token::new("se:cret".to_owned()).unwrap().user(&headers)
    }

    fn accepts(authorization: &str) -> bool {
        user(authorization).is_some()
    }

    fn basic(text: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(text))
    }

    #[test]
    fn bearer_and_the_password_of_any_user_are_accepted() {
        assert!(accepts("Bearer se:cret"));
        assert!(accepts("bearer  se:cret"));
        assert!(accepts(&basic("anyone:se:cret")));
        assert!(accepts(&basic(":se:cret")));
    }

    #[test]
    fn who_logs_in_by_name_is_known_by_it() {
        assert_eq!(user(&basic("anna:se:cret")).as_deref(), Some("anna"));
        assert_eq!(user(&basic(":se:cret")).as_deref(), Some("operator"));
        assert_eq!(user("Bearer se:cret").as_deref(), Some("operator"));
    }

    #[test]
    fn everything_else_is_refused() {
        for bad in ["", "Bearer", "Bearer ", "Bearer se:cre", "Bearer se:cret2", "se:cret", "Digest se:cret", "Basic ?"]
        {
            assert!(!accepts(bad), "{bad}");
        }
        assert!(!accepts(&basic("se:cret")));
        assert!(!accepts(&basic("se:cret:")));
        assert!(!accepts(&basic("anyone")));
        assert_eq!(Token::new("x".to_owned()).unwrap().user(&HeaderMap::new()), None);
    }

    #[test]
    fn a_token_that_cannot_be_sent_is_refused() {
        for bad in ["", " ", "a b", "a\n", "\0"] {
            assert!(Token::new(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn debug_does_not_show_the_token() {
        assert_eq!(format!("{:?}", Token::new("secret".to_owned()).unwrap()), "Token(…)");
    }
}
