//! Owns what rustls is told to check of kubelet's certificate, and what is said where it does not hold.
//! Called by `kubelet`, for each handshake.
//! Must never skip the proof that the other side has the certificate's key: a certificate alone is public.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use guard_policy::{pin::Pin, ruleset::CertificateDemand};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    server::ParsedCertificate,
};

use crate::sys::lock::lock;

/// What a handshake showed.
pub(crate) struct Shown {
    pub(crate) sha256: Option<[u8; 32]>,
    pub(crate) error: Option<String>,
}

/// Checks what a demand asks for, and notes the certificate.
#[derive(Debug)]
pub(crate) struct Verifier {
    chain: Option<Arc<WebPkiServerVerifier>>,
    pins: Vec<Pin>,
    provider: Arc<CryptoProvider>,
    seen: Mutex<Option<[u8; 32]>>,
}

impl Verifier {
    pub(crate) fn seen(&self) -> Option<[u8; 32]> {
        *lock(&self.seen)
    }
}

/// A client that checks this. It has no certificate of its own: kubelet asks for one and does without.
pub(crate) fn client(demand: &CertificateDemand) -> Result<(Arc<Verifier>, ClientConfig), String> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let chain = demand.ca.as_deref().map(|ca| chain(ca, &provider)).transpose()?;
    let verifier = Arc::new(Verifier {
        chain,
        pins: demand.pins.clone(),
        provider: Arc::clone(&provider),
        seen: Mutex::default(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    // A resumed session would show no certificate.
    config.resumption = Resumption::disabled();
    Ok((verifier, config))
}

fn chain(ca: &Path, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, String> {
    let unusable = |error: &dyn std::fmt::Display| format!("the CA file {} is not usable: {error}", ca.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|error| unusable(&error))? {
        let certificate = certificate.map_err(|error| unusable(&error))?;
        roots.add(certificate).map_err(|error| unusable(&error))?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build();
    verifier.map_err(|error| unusable(&error))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *lock(&self.seen) = Some(sha256(certificate));
        if let Some(chain) = &self.chain {
            chain.verify_server_cert(certificate, intermediates, name, ocsp, now)?;
        }
        if !self.pins.is_empty() {
            let key = Pin::of(&ParsedCertificate::try_from(certificate)?.subject_public_key_info());
            if !self.pins.contains(&key) {
                return Err(CertificateError::ApplicationVerificationFailure.into());
            }
        }
        if self.chain.is_none() && self.pins.is_empty() {
            return Err(CertificateError::UnknownIssuer.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Why a handshake failed, in words that mean the same to the proxy-server as to people.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error is told in the library's own words")]
pub(crate) fn explain(error: &io::Error, demand: &CertificateDemand, address: SocketAddr) -> String {
    let name = demand.name.clone().unwrap_or_else(|| address.ip().to_string());
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => "it ends the TLS handshake".to_owned(),
            other => format!("the TLS handshake fails: {other}"),
        };
    };
    match tls {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::ApplicationVerificationFailure => "its public key is none of the pins".to_owned(),
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                let ca = demand.ca.as_deref().unwrap_or(Path::new("the policy"));
                format!("its certificate does not come from a CA in {}", ca.display())
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet".to_owned()
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("its certificate is not for `{name}`")
            }
            other => format!("its certificate is refused: {other}"),
        },
        rustls::Error::InvalidMessage(_) => "it does not speak TLS".to_owned(),
        other => format!("the TLS handshake fails: {other}"),
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().unwrap_or_default()
}
