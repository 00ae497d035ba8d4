use std::error::Error;

/// A setting of a webhook that cannot work; the text says why and never shows the secret or the URL.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidWebhook {
    /// The URL cannot be read.
    #[error("the webhook URL is not a valid URL")]
    Url(#[source] Box<dyn Error + Send + Sync>),
    /// The URL is not one of HTTP.
    #[error("the webhook URL must begin with http:// or https://")]
    Scheme,
    /// The URL has a user name or password.
    #[error("the webhook URL contains a user name or password; leave it out, the signature tells who sends")]
    Userinfo,
    /// The secret is not one of Standard Webhooks.
    #[error("a webhook secret is `whsec_` and the base64 of 24 to 64 random bytes; this one {0}")]
    Secret(&'static str),
    /// The CloudEvents source is not a URI reference.
    #[error("the source {0:?} is not a URI reference such as `https://shop.example.com` or `/shop`")]
    Source(String),
    /// The network is not one.
    #[error("{0:?} is not a network; write an address such as `10.0.0.7`, or a network such as `10.0.0.0/8`")]
    Network(String),
    /// The proxy is none that can be used. The URL is not shown: it may have a password.
    #[error("a proxy is given as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT")]
    Proxy,
    /// No time is left for an attempt.
    #[error("a webhook needs more time than zero")]
    Timeout,
    /// The certificates cannot be used.
    #[error("the text is not one or more certificates in PEM form")]
    Certificate(#[source] Option<Box<dyn Error + Send + Sync>>),
}
