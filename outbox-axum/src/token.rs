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

    /// Whether the request carries the token: as bearer, or as the password of any user.
    pub(crate) fn is_in(&self, headers: &HeaderMap) -> bool {
        let Some((scheme, credentials)) = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.trim_ascii().split_once(' '))
        else {
            return false;
        };
        let credentials = credentials.trim_ascii_start();
        if scheme.eq_ignore_ascii_case("bearer") {
            return self.is(credentials.as_bytes());
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let Ok(decoded) = BASE64_STANDARD.decode(credentials) else { return false };
            let colon = decoded.iter().position(|byte| *byte == b':');
            return colon.is_some_and(|colon| self.is(&decoded[colon + 1..]));
        }
        false
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

    fn accepts(authorization: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        Token::new("se:cret".to_owned()).unwrap().is_in(&headers)
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
    fn everything_else_is_refused() {
        for bad in ["", "Bearer", "Bearer ", "Bearer se:cre", "Bearer se:cret2", "se:cret", "Digest se:cret", "Basic ?"]
        {
            assert!(!accepts(bad), "{bad}");
        }
        assert!(!accepts(&basic("se:cret")));
        assert!(!accepts(&basic("se:cret:")));
        assert!(!accepts(&basic("anyone")));
        assert!(!Token::new("x".to_owned()).unwrap().is_in(&HeaderMap::new()));
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
