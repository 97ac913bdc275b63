//! Owns what a proxy-server's certificate has to be beyond chain, validity and name: one of the pinned keys, one of the named subjects.
//! Called by rustls in each handshake; `tls` builds it.
//! Must never accept what rustls' own verifier refuses: it only adds.

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
};

/// The SHA-256 of a server's public key (SubjectPublicKeyInfo), as in RFC 7469.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pin([u8; 32]);

impl Pin {
    /// That of a key.
    pub fn of(key: &SubjectPublicKeyInfoDer<'_>) -> Pin {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, key);
        let mut pin = [0; 32];
        pin.iter_mut().zip(digest.as_ref()).for_each(|(to, from)| *to = *from);
        Pin(pin)
    }
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Pin, String> {
        let failed = || format!("`{text}` is no pin; write `sha256/` and the base64 of 32 bytes");
        let digits = text.strip_prefix("sha256/").or(text.strip_prefix("sha256//")).unwrap_or(text);
        base64(digits).and_then(|bytes| bytes.try_into().ok()).map(Pin).ok_or_else(failed)
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256/{}", to_base64(&self.0))
    }
}

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
pub(super) enum Refused {
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
pub(super) struct Verifier {
    pub(super) chain: Arc<WebPkiServerVerifier>,
    pub(super) demands: Demands,
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

/// Standard base64 with its padding.
pub(super) fn to_base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let digit = DIGITS.get((bits >> (18 - 6 * place)) as usize & 63).copied().unwrap_or(b'=');
            text.push(if place > group.len() { '=' } else { char::from(digit) });
        }
    }
    text
}

/// Standard base64, with or without its padding.
pub(crate) fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut held) = (Vec::with_capacity(digits.len() * 3 / 4), 0u32, 0u32);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        (bits, held) = (bits << 6 | u32::from(value), held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    (bits == 0 && held < 6).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, PublicKeyData, SanType};

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
        let wrong = Pin([7; 32]);
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

    #[test]
    fn a_pin_is_what_curl_and_rfc_7469_write() {
        let text = "sha256/AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=";
        let pin: Pin = text.parse().unwrap();
        assert_eq!(pin.to_string(), text);
        for bad in ["", "sha256/", "sha256/AQID", "sha1/AQIDBAUGBwgJCgsMDQ4PEBESExQ=", "sha256/****"] {
            assert!(bad.parse::<Pin>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_pin_reads_as_it_is_written(bytes in any::<[u8; 32]>()) {
            let text = Pin(bytes).to_string();
            prop_assert_eq!(text.parse::<Pin>(), Ok(Pin(bytes)));
        }
    }
}
