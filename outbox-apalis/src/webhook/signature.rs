use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::invalid::InvalidWebhook;

/// Signs as Standard Webhooks wants, once with each secret.
#[derive(Clone)]
pub(super) struct Signer {
    keys: Vec<Hmac<Sha256>>,
}

impl Signer {
    pub(super) fn new(secret: &str) -> Result<Self, InvalidWebhook> {
        Ok(Self { keys: vec![key(secret)?] })
    }

    pub(super) fn add(&mut self, secret: &str) -> Result<(), InvalidWebhook> {
        self.keys.push(key(secret)?);
        Ok(())
    }

    pub(super) fn sign(&self, id: &str, timestamp: u64, body: &str) -> String {
        let head = format!("{id}.{timestamp}.");
        let signatures = self.keys.iter().map(|key| {
            let signature = key.clone().chain_update(&head).chain_update(body).finalize();
            format!("v1,{}", STANDARD.encode(signature.into_bytes()))
        });
        signatures.collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} secrets", self.keys.len())
    }
}

fn key(secret: &str) -> Result<Hmac<Sha256>, InvalidWebhook> {
    let encoded = secret.strip_prefix("whsec_").ok_or(InvalidWebhook::Secret("does not begin with `whsec_`"))?;
    // The decoder's own error would show a byte of the secret.
    let bytes = STANDARD.decode(encoded).map_err(|_| InvalidWebhook::Secret("is not base64 behind the `whsec_`"))?;
    match bytes.len() {
        ..24 => Err(InvalidWebhook::Secret("has fewer than 24 bytes")),
        65.. => Err(InvalidWebhook::Secret("has more than 64 bytes")),
        _ => Hmac::new_from_slice(&bytes).map_err(|_| InvalidWebhook::Secret("has a length that HMAC refuses")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    #[test]
    fn the_test_vector_of_standard_webhooks_is_signed_as_published() {
        let signature =
            Signer::new(SECRET).unwrap().sign("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn each_secret_adds_a_signature_behind_a_space() {
        let other = format!("whsec_{}", STANDARD.encode([7; 24]));
        let mut both = Signer::new(SECRET).unwrap();
        both.add(&other).unwrap();
        let expected = [SECRET, &other].map(|secret| Signer::new(secret).unwrap().sign("id", 1, "{}")).join(" ");
        assert_eq!(both.sign("id", 1, "{}"), expected);
        assert_eq!(format!("{both:?}"), "2 secrets");
    }

    #[test]
    fn a_secret_of_another_form_is_refused_and_not_shown() {
        let of = |bytes: usize| format!("whsec_{}", STANDARD.encode(vec![b'k'; bytes]));
        for refused in [
            "",
            "whsec_",
            "c2VjcmV0LXRoYXQtaXMtbG9uZy1lbm91Z2g=",
            "WHSEC_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaS!",
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n",
            &of(23),
            &of(65),
        ] {
            let error = key(refused).map(|_| ()).expect_err(refused);
            let (text, debug) = (error.to_string(), format!("{error:?}"));
            assert!(text.starts_with("a webhook secret is `whsec_` and the base64 of 24 to 64 random bytes"), "{text}");
            let secret = refused.trim_start_matches("whsec_").trim();
            assert!(secret.is_empty() || !(text.contains(secret) || debug.contains(secret)), "{text} {debug}");
        }
        for accepted in [of(24), of(32), of(64)] {
            key(&accepted).map(|_| ()).expect(&accepted);
        }
    }
}
