//! Owns the judgement on kubelet's certificate, and why a certificate or its handshake is refused.
//! Called by `check`, for each handshake.
//! Must never admit a certificate on no grounds: a demand without CA and pins is met by none.

use std::{
    error::Error,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use guard_policy::{pin::Pin, ruleset::CertificateDemand};
use rustls::{
    CertificateError, ClientConfig, RootCertStore,
    client::{Resumption, VerifierBuilderError, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{
        CertificateDer, ServerName, UnixTime,
        pem::{self, PemObject},
    },
    server::ParsedCertificate,
};

use crate::{
    net::server_verifier::{JudgeCertificate, ServerVerifier},
    sys::{error_chain::with_causes, lock::lock},
};

/// Why what listens is not taken for kubelet.
#[derive(Debug, thiserror::Error)]
pub enum CertificateRefusal {
    /// The CA file of the policy cannot be used.
    #[error("the CA file {} is not usable", path.display())]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: CaFileError,
    },
    /// Its key is not pinned.
    #[error("its public key is none of the pins")]
    NotPinned,
    /// No chain to a CA of the file, or no CA at all in the policy.
    #[error("its certificate does not come from a CA in {}", ca.as_deref().unwrap_or(Path::new("the policy")).display())]
    UnknownIssuer {
        /// The file.
        ca: Option<PathBuf>,
    },
    /// It was valid.
    #[error("its certificate has expired")]
    Expired,
    /// It will be valid.
    #[error("its certificate is not valid yet")]
    NotValidYet,
    /// It is another one's.
    #[error("its certificate is not for `{name}`")]
    WrongName {
        /// The name that the policy asks for.
        name: String,
    },
    /// Anything else is wrong with it.
    #[error("its certificate is refused: {0}")]
    Certificate(CertificateError),
    /// What came is not TLS.
    #[error("it does not speak TLS")]
    NotTls,
    /// The connection ended in the handshake.
    #[error("it ends the TLS handshake")]
    Ended,
    /// The connection failed in the handshake.
    #[error("the TLS handshake fails: {0}")]
    Connection(io::ErrorKind),
    /// The handshake failed.
    #[error("the TLS handshake fails")]
    Handshake(#[source] rustls::Error),
}

/// Why a CA file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaFileError {
    /// It cannot be read, or is not PEM.
    #[error(transparent)]
    Pem(#[from] pem::Error),
    /// It holds something that is not a certificate.
    #[error(transparent)]
    Certificate(#[from] rustls::Error),
    /// It holds no CA.
    #[error(transparent)]
    Verifier(#[from] VerifierBuilderError),
}

/// What a handshake showed.
pub(crate) struct Shown {
    pub(crate) sha256: Option<[u8; 32]>,
    pub(crate) refusal: Option<CertificateRefusal>,
}

impl CertificateRefusal {
    /// With its causes, in words for the control plane, the log and `status`.
    pub fn words(&self) -> String {
        with_causes(self.to_string(), self.source())
    }
}

/// Judges by a demand, and remembers the certificate.
#[derive(Debug)]
pub(crate) struct DemandJudge {
    chain: Option<Arc<WebPkiServerVerifier>>,
    pins: Vec<Pin>,
    seen: Mutex<Option<[u8; 32]>>,
}

impl DemandJudge {
    pub(crate) fn seen(&self) -> Option<[u8; 32]> {
        *lock(&self.seen)
    }
}

/// A client that checks a demand. It has no certificate of its own: kubelet asks for one but does not require it.
pub(crate) fn client(
    demand: &CertificateDemand,
) -> Result<(Arc<ServerVerifier<DemandJudge>>, ClientConfig), CertificateRefusal> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let chain = demand
        .ca
        .as_deref()
        .map(|ca| chain(ca, &provider).map_err(|source| CertificateRefusal::CaFile { path: ca.to_owned(), source }))
        .transpose()?;
    let judge = DemandJudge { chain, pins: demand.pins.clone(), seen: Mutex::default() };
    let verifier = ServerVerifier::new(judge, &provider);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(CertificateRefusal::Handshake)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    // A resumed session would show no certificate.
    config.resumption = Resumption::disabled();
    Ok((verifier, config))
}

fn chain(ca: &Path, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, CaFileError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca)? {
        roots.add(certificate?)?;
    }
    Ok(WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build()?)
}

impl JudgeCertificate for DemandJudge {
    fn judge(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        *lock(&self.seen) = Some(sha256(certificate));
        if let Some(chain) = &self.chain {
            chain.verify_server_cert(certificate, intermediates, name, &[], now)?;
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
        Ok(())
    }
}

/// Why a handshake failed.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error is reported in the library's own words")]
pub(crate) fn explain(error: &io::Error, demand: &CertificateDemand, address: SocketAddr) -> CertificateRefusal {
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => CertificateRefusal::Ended,
            other => CertificateRefusal::Connection(other),
        };
    };
    match tls {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::ApplicationVerificationFailure => CertificateRefusal::NotPinned,
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                CertificateRefusal::UnknownIssuer { ca: demand.ca.clone() }
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => CertificateRefusal::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                CertificateRefusal::NotValidYet
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                let name = demand.name.clone().unwrap_or_else(|| address.ip().to_string());
                CertificateRefusal::WrongName { name }
            }
            other => CertificateRefusal::Certificate(other.clone()),
        },
        rustls::Error::InvalidMessage(_) => CertificateRefusal::NotTls,
        other => CertificateRefusal::Handshake(other.clone()),
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ::aws_lc_rs::digest::digest(&::aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().try_into().unwrap_or_default()
}
