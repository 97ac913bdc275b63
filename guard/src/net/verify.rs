//! Owns the constraints on a proxy-server's certificate besides chain, validity and name: a pinned key, a subject alternative name.
//! Called by rustls in each handshake; `tls` builds the verifier.
//! Must never accept a certificate that rustls' own verifier refuses.

use std::{net::IpAddr, str::FromStr, sync::Arc};

use guard_policy::pin::Pin;
use rustls::{
    CertificateError, Error, OtherError,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use crate::net::server_verifier::JudgeCertificate;

/// A subject alternative name that the certificate must have, besides the dialled name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum San {
    /// A DNS name or an address.
    Name(ServerName<'static>),
    /// A URI, as in SPIFFE.
    Uri(String),
}

/// The text is not a subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a DNS name, an address nor a URI")]
pub struct SanError(String);

impl FromStr for San {
    type Err = SanError;

    fn from_str(text: &str) -> Result<San, SanError> {
        let name =
            |name: &str| ServerName::try_from(name.to_owned()).map(San::Name).map_err(|_| SanError(name.to_owned()));
        match text.split_once(':') {
            Some(("URI" | "uri", uri)) if !uri.is_empty() => Ok(San::Uri(uri.to_owned())),
            Some(("DNS" | "dns", dns)) => name(dns),
            Some(("IP" | "ip", ip)) if ip.parse::<IpAddr>().is_ok() => name(ip),
            _ if text.contains("://") => Ok(San::Uri(text.to_owned())),
            _ => name(text),
        }
    }
}

/// What a server's certificate must have besides the right CA.
#[derive(Clone, Debug, Default)]
pub struct CertificateConstraints {
    /// Its key must be one of these, if there are any.
    pub pins: Vec<Pin>,
    /// It must have one of these names, if there are any.
    pub names: Vec<San>,
}

/// The constraint that a certificate does not meet.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConstraintError {
    /// Its key is not pinned.
    #[error("its key is none of --server-spki-pin: it is {0}")]
    Pin(Pin),
    /// It has none of the names.
    #[error("it has none of --server-san")]
    Name,
}

/// rustls' checks of the chain, then the constraints.
#[derive(Debug)]
pub(crate) struct ConstrainedChain {
    pub(crate) chain: Arc<WebPkiServerVerifier>,
    pub(crate) constraints: CertificateConstraints,
}

impl CertificateConstraints {
    fn judge(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let refused =
            |why: ConstraintError| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))));
        let found = Pin::of(&parsed.subject_public_key_info());
        if !self.pins.is_empty() && !self.pins.contains(&found) {
            return Err(refused(ConstraintError::Pin(found)));
        }
        let holds = |name: &San| match name {
            San::Name(name) => parsed.verify_is_valid_for_subject_name(name).is_ok(),
            San::Uri(uri) => parsed.valid_uri_names().any(|held| held == uri),
        };
        if !self.names.is_empty() && !self.names.iter().any(holds) {
            return Err(refused(ConstraintError::Name));
        }
        Ok(())
    }
}

impl JudgeCertificate for ConstrainedChain {
    fn judge(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        self.chain.verify_server_cert(certificate, intermediates, name, &[], now)?;
        self.constraints.judge(certificate)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PublicKeyData, SanType};
    use rustls::pki_types::SubjectPublicKeyInfoDer;

    use super::*;

    #[test]
    fn a_certificate_has_to_meet_one_pin_and_one_name() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::DnsName("proxy.example".try_into().unwrap()),
            SanType::URI("spiffe://cluster.local/proxy".try_into().unwrap()),
            SanType::IpAddress("10.0.0.1".parse().unwrap()),
        ];
        let certificate = params.self_signed(&key).unwrap();
        let right = Pin::of(&SubjectPublicKeyInfoDer::from(key.subject_public_key_info()));
        let other = KeyPair::generate().unwrap();
        let wrong = Pin::of(&SubjectPublicKeyInfoDer::from(other.subject_public_key_info()));
        let judge = |pins: &[Pin], names: &[&str]| {
            let names = names.iter().map(|name| name.parse().unwrap()).collect();
            CertificateConstraints { pins: pins.to_vec(), names }.judge(certificate.der()).is_ok()
        };
        assert!(judge(&[], &[]) && judge(&[wrong, right], &[]) && !judge(&[wrong], &[]));
        for name in [
            "proxy.example",
            "DNS:proxy.example",
            "spiffe://cluster.local/proxy",
            "URI:spiffe://cluster.local/proxy",
            "IP:10.0.0.1",
        ] {
            assert!(judge(&[right], &["other.example", name]), "{name}");
        }
        for name in ["example", "spiffe://cluster.local/prox", "spiffe://cluster.local/proxy/x", "10.0.0.2"] {
            assert!(!judge(&[right], &[name]), "{name}");
        }
        assert!(!judge(&[wrong], &["proxy.example"]));
        assert!("".parse::<San>().is_err() && "IP:proxy".parse::<San>().is_err());
    }
}
