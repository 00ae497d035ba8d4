use std::sync::Arc;

use outbox_apalis::{InvalidWebhook, WebhookPublisher};
use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject as _},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use crate::fixture::{Receiver, SECRET, event, failure, publish, publisher, raw};

/// Has signed the certificate of the name `localhost`. Both are valid until 2120.
pub(crate) const AUTHORITY: &str = include_str!("tls/authority.pem");

/// A destination behind TLS; the port.
pub(crate) async fn receiver() -> u16 {
    let certificate = CertificateDer::from_pem_slice(include_bytes!("tls/localhost.pem")).unwrap();
    let key = PrivatePkcs8KeyDer::from(include_bytes!("tls/localhost.key.der").as_slice());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let address = raw(move |connection| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut connection) = acceptor.accept(connection).await else { return };
            let _ = connection.read(&mut [0; 4096]).await;
            let _ = connection.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await;
            let _ = connection.read(&mut [0; 4096]).await;
        }
    })
    .await;
    address.port()
}

#[tokio::test]
async fn a_certificate_of_a_trusted_authority_is_accepted() {
    let url = format!("https://localhost:{}/hook", receiver().await);
    publish(&publisher(&url).trust(AUTHORITY).unwrap(), event()).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_is_tried_again() {
    let port = receiver().await;
    let error = failure(&publisher(&format!("https://localhost:{port}"))).await;
    let expected =
        format!("no connection to https://localhost:{port}: TLS failed: invalid peer certificate: UnknownIssuer");
    assert_eq!((error.message(), error.is_permanent()), (expected.as_str(), false));
}

#[tokio::test]
async fn a_certificate_of_another_name_is_tried_again() {
    let url = format!("https://127.0.0.1:{}", receiver().await);
    let error = failure(&publisher(&url).trust(AUTHORITY).unwrap()).await;
    assert!(!error.is_permanent());
    let expected =
        format!("no connection to {url}: TLS failed: invalid peer certificate: certificate not valid for name");
    assert!(error.message().starts_with(&expected), "{error}");
}

#[tokio::test]
async fn a_destination_without_tls_is_tried_again() {
    let plain = Receiver::accepting().await;
    let error = failure(&publisher(&format!("https://{}", plain.address))).await;
    assert!(!error.is_permanent());
    assert!(
        error.message().starts_with(&format!("no connection to https://{}: TLS failed: ", plain.address)),
        "{error}"
    );
}

#[test]
fn a_broken_authority_is_refused() {
    let broken = AUTHORITY.replacen('M', "A", 1);
    let error = WebhookPublisher::new("https://example.com", SECRET).unwrap().trust(&broken).unwrap_err();
    assert!(matches!(error, InvalidWebhook::Certificate(Some(_))), "{error:?}");
}
