//! Owns the part of a certificate verifier that is the same for every server: the proof that the server has the certificate's key.
//! Called by rustls in each handshake; `tls` and `dial/kubelet` add the judgement on the certificate.
//! Must never skip that proof: a certificate alone is public.

use std::{fmt::Debug, sync::Arc};

use rustls::{
    DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

/// A judgement on the certificate that a server shows.
pub(crate) trait JudgeCertificate: Debug + Send + Sync {
    /// Fails if the certificate is refused.
    fn judge(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error>;
}

/// A verifier for rustls that judges the certificate and checks the signature of the handshake.
#[derive(Debug)]
pub(crate) struct ServerVerifier<J> {
    pub(crate) judge: J,
    algorithms: WebPkiSupportedAlgorithms,
}

impl<J: JudgeCertificate> ServerVerifier<J> {
    /// A verifier with the signature algorithms of a provider.
    pub(crate) fn new(judge: J, provider: &CryptoProvider) -> Arc<ServerVerifier<J>> {
        Arc::new(ServerVerifier { judge, algorithms: provider.signature_verification_algorithms })
    }
}

impl<J: JudgeCertificate> ServerCertVerifier for ServerVerifier<J> {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.judge.judge(certificate, intermediates, name, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
