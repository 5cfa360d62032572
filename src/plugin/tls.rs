//! go-plugin's AutoMTLS: both sides make a certificate for themselves and pin the other's.
//!
//! The host's certificate is self-signed, a CA and P-521, which path building refuses as a leaf.
//! There is no path to build: the certificate must be the one of `PLUGIN_CLIENT_CERT`, byte for
//! byte, and the handshake must be signed with its key.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};

/// The only name that hosts ask for.
const SERVER_NAME: &str = "localhost";

/// AutoMTLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("PLUGIN_CLIENT_CERT holds no PEM certificate")]
    ClientCertificate(#[source] rustls::pki_types::pem::Error),
    #[error("cannot make a certificate")]
    Make(#[source] rcgen::Error),
    #[error("cannot set TLS up")]
    Configure(#[source] rustls::Error),
}

/// Our side of AutoMTLS.
#[derive(Debug, Clone)]
pub(super) struct AutoMtls {
    pub(super) config: Arc<ServerConfig>,
    /// DER, for the handshake line.
    pub(super) certificate: Vec<u8>,
}

impl AutoMtls {
    /// A fresh certificate for us, and `client_pem` as the only client.
    pub(super) fn for_client(client_pem: &str) -> Result<Self, TlsError> {
        let pinned = CertificateDer::from_pem_slice(client_pem.as_bytes())
            .map_err(TlsError::ClientCertificate)?;
        let ours =
            rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()]).map_err(TlsError::Make)?;
        let certificate = ours.cert.der().clone();
        let key = PrivateKeyDer::try_from(ours.signing_key.serialize_der())
            .map_err(|reason| TlsError::Configure(rustls::Error::General(reason.to_owned())))?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Configure)?
            .with_client_cert_verifier(Arc::new(Pinned { pinned, provider }))
            .with_single_cert(vec![certificate.clone()], key)
            .map_err(TlsError::Configure)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self {
            config: Arc::new(config),
            certificate: certificate.to_vec(),
        })
    }
}

/// Accepts exactly one certificate.
#[derive(Debug)]
struct Pinned {
    pinned: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        if *end_entity == self.pinned {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
