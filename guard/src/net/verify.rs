//! Owns what a proxy-server's certificate has to be beyond chain, validity and name: one of the pinned keys, one of the named subjects.
//! Called by rustls in each handshake; `tls` builds it.
//! Must never accept what rustls' own verifier refuses: it only adds.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use guard_policy::pin::Pin;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};

/// A name that the certificate has to hold, beside the one that was dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum San {
    /// A DNS name or an address.
    Name(ServerName<'static>),
    /// A URI, as in SPIFFE.
    Uri(String),
}

impl FromStr for San {
    type Err = String;

    fn from_str(text: &str) -> Result<San, String> {
        let name = |name: &str| {
            ServerName::try_from(name.to_owned())
                .map(San::Name)
                .map_err(|_| format!("`{name}` is neither a DNS name, an address nor a URI"))
        };
        match text.split_once(':') {
            Some(("URI" | "uri", uri)) if !uri.is_empty() => Ok(San::Uri(uri.to_owned())),
            Some(("DNS" | "dns", dns)) => name(dns),
            Some(("IP" | "ip", ip)) if ip.parse::<IpAddr>().is_ok() => name(ip),
            _ if text.contains("://") => Ok(San::Uri(text.to_owned())),
            _ => name(text),
        }
    }
}

/// What is asked of a server's certificate beside the CA.
#[derive(Clone, Debug, Default)]
pub struct Demands {
    /// Its key is one of these, if there are any.
    pub pins: Vec<Pin>,
    /// It holds one of these, if there are any.
    pub names: Vec<San>,
}

/// Why a certificate of the right CA is not the right one.
#[derive(Debug)]
pub(crate) enum Refused {
    Pin(Pin),
    Name,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Pin(found) => write!(f, "its key is none of --server-spki-pin: it is {found}"),
            Refused::Name => f.write_str("it holds none of --server-san"),
        }
    }
}

impl std::error::Error for Refused {}

/// rustls' verifier and the demands.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) chain: Arc<WebPkiServerVerifier>,
    pub(crate) demands: Demands,
}

impl Demands {
    fn judge(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let parsed = webpki::EndEntityCert::try_from(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let refused = |why: Refused| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))));
        let found = Pin::of(&parsed.subject_public_key_info());
        if !self.pins.is_empty() && !self.pins.contains(&found) {
            return Err(refused(Refused::Pin(found)));
        }
        let holds = |name: &San| match name {
            San::Name(name) => parsed.verify_is_valid_for_subject_name(name).is_ok(),
            San::Uri(uri) => parsed.valid_uri_names().any(|held| held == uri),
        };
        if !self.names.is_empty() && !self.names.iter().any(holds) {
            return Err(refused(Refused::Name));
        }
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.chain.verify_server_cert(certificate, intermediates, name, ocsp, now)?;
        self.demands.judge(certificate)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.chain.root_hint_subjects()
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
            Demands { pins: pins.to_vec(), names }.judge(certificate.der()).is_ok()
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
