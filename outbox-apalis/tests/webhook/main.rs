//! What a webhook receives, and what its answers mean.

mod addresses;
mod answers;
mod connections;
mod fixture;
mod format;
mod limits;
mod proxy;
mod secrecy;
mod standard_webhooks;
mod tls;
