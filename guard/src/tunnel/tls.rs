//! Owns the TLS side of the tunnel: trust, identity, and which check failed when there is no connection.
//! Called by `connect`, for each attempt: rotated files are picked up by the next one.
//! Must never trust anything but the CA file, and never connect without checking chain, validity and name.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    CertificateError, ClientConfig, RootCertStore,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, InvalidDnsNameError, PrivateKeyDer, pem, pem::PemObject},
};

use super::TunnelConfig;

/// Why TLS cannot be set up, before anything is sent.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not what it should be.
    #[error("{what} {path}: {error}")]
    Pem {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        error: pem::Error,
    },
    /// A file holds nothing of its kind.
    #[error("{what} {path} holds no certificate")]
    Empty {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// A certificate or key that rustls refuses.
    #[error("{what} {path}: {error}")]
    Refused {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        error: rustls::Error,
    },
    /// The provider has no TLS version in common with us.
    #[error("no usable TLS version: {0}")]
    Versions(rustls::Error),
    /// The server's host is neither a name nor an address.
    #[error("--proxy-server-host `{0}` is neither a DNS name nor an address")]
    Host(String, #[source] InvalidDnsNameError),
}

/// Reads the files and builds the client side. No session is resumed: a resumed one would skip the certificate checks.
pub fn client_config(config: &TunnelConfig) -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("--ca-cert", &config.ca)? {
        roots.add(certificate).map_err(|error| TlsError::Refused {
            what: "--ca-cert",
            path: config.ca.clone(),
            error,
        })?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Versions)?
        .with_root_certificates(roots);
    let mut client = match &config.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates("--agent-cert", certificate)?;
            let private = PrivateKeyDer::from_pem_file(key).map_err(|error| TlsError::Pem {
                what: "--agent-key",
                path: key.clone(),
                error,
            })?;
            let refused =
                |error| TlsError::Refused { what: "--agent-cert and --agent-key", path: certificate.clone(), error };
            builder.with_client_auth_cert(chain, private).map_err(refused)?
        }
    };
    client.resumption = Resumption::disabled();
    client.alpn_protocols = config.alpn.iter().map(|id| id.as_bytes().to_vec()).chain([b"h2".to_vec()]).collect();
    Ok(client)
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |error| TlsError::Pem { what, path: path.to_path_buf(), error };
    let certificates =
        CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if certificates.is_empty() {
        return Err(TlsError::Empty { what, path: path.to_path_buf() });
    }
    Ok(certificates)
}

/// Which check a handshake failed at, and that in words.
#[expect(clippy::wildcard_enum_match_arm, reason = "every other error is told in the library's own words")]
pub fn explain(error: &io::Error, config: &TunnelConfig) -> (&'static str, String) {
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return ("handshake", format!("the TLS handshake failed: {error}"));
    };
    match tls {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                ("issuer", format!("the proxy-server's certificate does not come from a CA in {}", config.ca.display()))
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                ("validity", format!("the proxy-server's certificate has expired ({certificate})"))
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => (
                "validity",
                format!("the proxy-server's certificate is not valid yet ({certificate}); is this node's clock right?"),
            ),
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                ("name", format!("the proxy-server's certificate is not for `{}` ({certificate})", config.host))
            }
            other => ("certificate", format!("the proxy-server's certificate is refused: {other}")),
        },
        rustls::Error::AlertReceived(alert) => (
            "client certificate",
            format!(
                "the proxy-server ended the handshake with the alert {alert:?}: it may refuse our client certificate"
            ),
        ),
        rustls::Error::NoApplicationProtocol => {
            ("alpn", "the proxy-server offers no h2: is this its agent port?".to_owned())
        }
        other => ("handshake", format!("the TLS handshake failed: {other}")),
    }
}
