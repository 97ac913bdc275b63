//! Owns the client side of TLS: the files with CA, identity, token and CRL, and the check that a failed handshake failed at.
//! Called by `tunnel/stream/credentials` and `cluster/api_server` for a configuration, by `tunnel/stream/establish` to explain a failure.
//! Must never trust anything but the CA file, and never connect without checking chain, validity and name.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    CertificateError, ClientConfig, RootCertStore,
    client::{Resumption, WebPkiServerVerifier},
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime, pem, pem::PemObject},
};
use tonic::metadata::AsciiMetadataValue;

use crate::{
    net::{
        server_verifier::ServerVerifier,
        verify::{CertificateConstraints, ConstrainedChain},
    },
    sys::times::ago,
};

/// The files that hold whom this process trusts and who it is.
#[derive(Clone, Debug, Default)]
pub struct CredentialFiles {
    /// The only trusted CA certificates, PEM.
    pub ca: PathBuf,
    /// Client certificate chain and key, PEM.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A service-account token.
    pub token: Option<PathBuf>,
    /// Revoked certificates, PEM.
    pub crl: Option<PathBuf>,
}

impl CredentialFiles {
    /// Each file with its flag.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let identity = self
            .identity
            .iter()
            .flat_map(|(certificate, key)| [("--agent-cert", certificate.as_path()), ("--agent-key", key.as_path())]);
        let token = self.token.iter().map(|path| ("--service-account-token-path", path.as_path()));
        let crl = self.crl.iter().map(|path| ("--crl-file", path.as_path()));
        [("--ca-cert", self.ca.as_path())].into_iter().chain(identity).chain(token).chain(crl)
    }
}

/// How TLS is done, besides what the files hold.
#[derive(Clone, Debug, Default)]
pub struct TlsOptions {
    /// What the server's certificate must have besides the right CA.
    pub constraints: CertificateConstraints,
    /// Whether TLS 1.2 is refused.
    pub only_tls13: bool,
    /// The protocols that are offered before `h2`.
    pub alpn: Vec<String>,
}

/// Why TLS cannot be set up. Nothing was sent yet.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{what} {path}: {error}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        error: io::Error,
    },
    /// A file is not PEM.
    #[error("{what}: {error}")]
    Pem {
        /// Which file.
        what: &'static str,
        /// What is wrong.
        error: pem::Error,
    },
    /// A file holds no object of its kind.
    #[error("{0} holds no {1}")]
    Empty(&'static str, &'static str),
    /// A certificate or key that rustls refuses.
    #[error("{what}: {error}")]
    Refused {
        /// Which file.
        what: &'static str,
        /// Why.
        error: rustls::Error,
    },
    /// A list of revoked certificates that rustls refuses.
    #[error("--ca-cert and --crl-file: {0}")]
    Verifier(rustls::client::VerifierBuilderError),
    /// The token cannot be sent as a header.
    #[error("--service-account-token-path holds no token: only visible ASCII characters can be sent")]
    Token,
    /// The provider has no TLS version in common with us.
    #[error("no usable TLS version: {0}")]
    Versions(rustls::Error),
}

/// The content of the files.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct CredentialBytes {
    pub(crate) ca: Vec<u8>,
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
    pub(crate) token: Option<String>,
    pub(crate) crl: Option<Vec<u8>>,
}

impl CredentialBytes {
    /// Reads all of them.
    pub(crate) fn read(files: &CredentialFiles) -> Result<CredentialBytes, TlsError> {
        let mut bytes_of = CredentialBytes::default();
        for (what, path) in files.all() {
            let bytes =
                std::fs::read(path).map_err(|error| TlsError::Read { what, path: path.to_path_buf(), error })?;
            match what {
                "--ca-cert" => bytes_of.ca = bytes,
                "--agent-cert" => bytes_of.identity.get_or_insert_default().0 = bytes,
                "--agent-key" => bytes_of.identity.get_or_insert_default().1 = bytes,
                "--crl-file" => bytes_of.crl = Some(bytes),
                _ => bytes_of.token = Some(String::from_utf8(bytes).map_err(|_| TlsError::Token)?.trim().to_owned()),
            }
        }
        Ok(bytes_of)
    }

    /// The `authorization` header, if there is a token.
    pub(crate) fn bearer(&self) -> Result<Option<AsciiMetadataValue>, TlsError> {
        let Some(token) = &self.token else { return Ok(None) };
        if token.is_empty() {
            return Err(TlsError::Token);
        }
        let mut bearer = AsciiMetadataValue::try_from(format!("Bearer {token}")).map_err(|_| TlsError::Token)?;
        bearer.set_sensitive(true);
        Ok(Some(bearer))
    }

    /// The client configuration. No session is resumed: resumption would skip the certificate checks.
    pub(crate) fn client(&self, options: &TlsOptions) -> Result<ClientConfig, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates("--ca-cert", &self.ca)? {
            roots.add(certificate).map_err(|error| TlsError::Refused { what: "--ca-cert", error })?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        if let Some(crl) = &self.crl {
            let lists = CertificateRevocationListDer::pem_slice_iter(crl).collect::<Result<Vec<_>, _>>();
            let lists = lists.map_err(|error| TlsError::Pem { what: "--crl-file", error })?;
            if lists.is_empty() {
                return Err(TlsError::Empty("--crl-file", "certificate revocation list"));
            }
            // An expired list says nothing about later revocations.
            chain = chain.with_crls(lists).enforce_revocation_expiration();
        }
        let chain = chain.build().map_err(TlsError::Verifier)?;
        let judge = ConstrainedChain { chain, constraints: options.constraints.clone() };
        let verifier = ServerVerifier::new(judge, &provider);
        let versions = if options.only_tls13 { &[&rustls::version::TLS13][..] } else { rustls::DEFAULT_VERSIONS };
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(TlsError::Versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut client = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = certificates("--agent-cert", certificate)?;
                let private =
                    PrivateKeyDer::from_pem_slice(key).map_err(|error| TlsError::Pem { what: "--agent-key", error })?;
                let refused = |error| TlsError::Refused { what: "--agent-cert and --agent-key", error };
                builder.with_client_auth_cert(chain, private).map_err(refused)?
            }
        };
        client.resumption = Resumption::disabled();
        client.alpn_protocols = options.alpn.iter().map(|id| id.as_bytes().to_vec()).chain([b"h2".to_vec()]).collect();
        Ok(client)
    }
}

fn certificates(what: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| TlsError::Pem { what, error })?;
    if certificates.is_empty() { Err(TlsError::Empty(what, "certificate")) } else { Ok(certificates) }
}

/// The help for a certificate from the future.
const CLOCK: &str = "is this node's clock right?";

/// Until when something was valid, and how long ago that was.
fn past(now: UnixTime, end: UnixTime) -> String {
    let since = Duration::from_secs(now.as_secs().saturating_sub(end.as_secs()));
    format!("it was valid until {}, {} ago", timestamp(end), ago(since))
}

/// The time, RFC 3339.
fn timestamp(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    seconds.map_or_else(|| "the end of time".to_owned(), |time| time.to_string())
}

/// The check that a handshake failed at, and an explanation.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error keeps the text of rustls")]
pub(crate) fn explain(error: &io::Error, host: &str, files: &CredentialFiles) -> (&'static str, String) {
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return ("handshake", format!("the TLS handshake failed: {error}"));
    };
    match tls {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => (
                "issuer",
                format!("the proxy-server's certificate does not come from a CA in {}", files.ca.display()),
            ),
            CertificateError::Expired => ("validity", "the proxy-server's certificate has expired".to_owned()),
            CertificateError::ExpiredContext { time, not_after } => {
                ("validity", format!("the proxy-server's certificate has expired: {}", past(*time, *not_after)))
            }
            CertificateError::NotValidYet => ("validity", format!("the proxy-server's certificate is not valid yet; {CLOCK}")),
            CertificateError::NotValidYetContext { not_before, .. } => (
                "validity",
                format!("the proxy-server's certificate is not valid before {}; {CLOCK}", timestamp(*not_before)),
            ),
            CertificateError::NotValidForName => ("name", format!("the proxy-server's certificate is not for `{host}`")),
            CertificateError::NotValidForNameContext { presented, .. } => {
                // rustls names them as in `DnsName("a.example")`.
                let names = presented.iter().map(|name| name.split('"').nth(1).unwrap_or(name)).collect::<Vec<_>>();
                let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
                ("name", format!("the proxy-server's certificate is not for `{host}`: it is for {names}"))
            }
            CertificateError::Revoked => {
                ("revocation", "the proxy-server's certificate is revoked by a list in --crl-file".to_owned())
            }
            CertificateError::UnknownRevocationStatus => (
                "revocation",
                "no list in --crl-file says whether the proxy-server's certificate is revoked: --crl-file needs a list of every CA of its chain below the root".to_owned(),
            ),
            CertificateError::ExpiredRevocationList => ("revocation", "a list in --crl-file has expired".to_owned()),
            CertificateError::ExpiredRevocationListContext { time, next_update } => {
                ("revocation", format!("a list in --crl-file has expired: {}", past(*time, *next_update)))
            }
            CertificateError::Other(other) => ("constraints", format!("the proxy-server's certificate is refused: {}", other.0)),
            other => ("certificate", format!("the proxy-server's certificate is refused: {other}")),
        },
        rustls::Error::AlertReceived(alert) => (
            "client certificate",
            format!(
                "the proxy-server ended the handshake with the alert {alert:?}: it may refuse our client certificate"
            ),
        ),
        rustls::Error::NoApplicationProtocol => {
            ("alpn", "the proxy-server offers no h2; check that this is its agent port".to_owned())
        }
        rustls::Error::PeerIncompatible(what) => {
            ("version", format!("the proxy-server and this agent have no TLS version or cipher suite in common ({what:?}); see --tls-min-version"))
        }
        other => ("handshake", format!("the TLS handshake failed: {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(error: CertificateError) -> String {
        let error = io::Error::other(rustls::Error::InvalidCertificate(error));
        explain(&error, "proxy.example", &CredentialFiles::default()).1
    }

    #[test]
    fn what_is_over_is_told_once_with_its_time() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let (time, end) = (at(1_764_000_000), at(1_763_990_000));
        assert_eq!(
            said(CertificateError::ExpiredRevocationListContext { time, next_update: end }),
            "a list in --crl-file has expired: it was valid until 2025-11-24T13:13:20Z, 2h46m ago"
        );
        assert_eq!(
            said(CertificateError::ExpiredContext { time, not_after: end }),
            "the proxy-server's certificate has expired: it was valid until 2025-11-24T13:13:20Z, 2h46m ago"
        );
        assert_eq!(
            said(CertificateError::NotValidYetContext { time: end, not_before: time }),
            "the proxy-server's certificate is not valid before 2025-11-24T16:00:00Z; is this node's clock right?"
        );
        let expected = rustls::pki_types::ServerName::try_from("proxy.example").unwrap();
        let presented = vec![r#"DnsName("a.example")"#.to_owned(), "IpAddress(10.0.0.1)".to_owned()];
        assert_eq!(
            said(CertificateError::NotValidForNameContext { expected, presented }),
            "the proxy-server's certificate is not for `proxy.example`: it is for a.example, IpAddress(10.0.0.1)"
        );
    }
}
