use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderValue, Uri};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use percent_encoding::percent_decode_str;
use url::Url;

use super::invalid::InvalidWebhook;

/// An HTTP proxy that tunnels: it is asked to `CONNECT`, for `https` and for `http`.
#[derive(Clone)]
pub(super) struct Proxy {
    uri: Uri,
    credentials: Option<HeaderValue>,
}

impl Proxy {
    pub(super) fn new(url: &str) -> Result<Self, InvalidWebhook> {
        // The errors of the parsers might show the password.
        let url = Url::parse(url).map_err(|_| InvalidWebhook::Proxy)?;
        let (Some(host), "http") = (url.host_str(), url.scheme()) else { return Err(InvalidWebhook::Proxy) };
        if url.path() != "/" || url.query().is_some() {
            return Err(InvalidWebhook::Proxy);
        }
        let uri = format!("http://{host}:{}/", url.port_or_known_default().unwrap_or(80));
        let uri = uri.parse().map_err(|_| InvalidWebhook::Proxy)?;
        Ok(Self { uri, credentials: credentials(&url)? })
    }

    pub(super) fn tunnel<C>(&self, connector: C) -> Tunnel<C> {
        let tunnel = Tunnel::new(self.uri.clone(), connector);
        match &self.credentials {
            None => tunnel,
            Some(credentials) => tunnel.with_auth(credentials.clone()),
        }
    }
}

/// Host and port.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.uri.authority().map_or("", |authority| authority.as_str()))
    }
}

fn credentials(url: &Url) -> Result<Option<HeaderValue>, InvalidWebhook> {
    if url.username().is_empty() && url.password().is_none() {
        return Ok(None);
    }
    let mut pair: Vec<u8> = percent_decode_str(url.username()).collect();
    pair.push(b':');
    pair.extend(percent_decode_str(url.password().unwrap_or_default()));
    let value = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(pair)));
    value.map(Some).map_err(|_| InvalidWebhook::Proxy)
}
