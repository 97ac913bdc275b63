//! Owns TLS of the lab, of servers and of clients, and HTTPS on top of it.
//! Called by the fake proxy-server, the fake API server, the pod of the cluster lab, and clients in Rust.
//! Must never be a product's TLS: the lab's keys lie readable in its directory.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use axum::Router;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use rustls::{
    ClientConfig, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;

use super::Listener;
use crate::certs::{Certs, roots};

/// Accepts TLS with the certificate chain and the key of two PEM files.
pub struct Tls {
    /// The certificate chain.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
    /// The CA that client certificates have to come from. Without one, no client certificate is asked for.
    pub clients: Option<PathBuf>,
    /// The application protocol (ALPN), if one is negotiated.
    pub protocol: Option<&'static str>,
    /// The versions of TLS.
    pub versions: Vec<&'static SupportedProtocolVersion>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

impl Tls {
    /// HTTP/1.1 to anybody.
    pub fn http(certificate: PathBuf, key: PathBuf) -> Tls {
        Tls { certificate, key, clients: None, protocol: Some("http/1.1"), versions: rustls::ALL_VERSIONS.to_vec() }
    }

    /// The same with the lab's server certificate.
    pub fn server(certs: &Certs) -> Tls {
        Tls::http(certs.path("server.crt"), certs.path("server.key"))
    }

    /// Reads the files.
    pub fn acceptor(&self) -> Result<TlsAcceptor> {
        let verifier = match &self.clients {
            Some(ca) => WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider()).build()?,
            None => WebPkiClientVerifier::no_client_auth(),
        };
        let chain = CertificateDer::pem_file_iter(&self.certificate)?.collect::<Result<Vec<_>, _>>()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&self.versions)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, PrivateKeyDer::from_pem_file(&self.key)?)?;
        config.alpn_protocols = self.protocol.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// Serves a router over HTTPS; a handler may upgrade its connection.
    pub async fn serve(&self, address: SocketAddr, router: Router) -> Result<Listener> {
        let acceptor = self.acceptor()?;
        Listener::start(address, move |tcp| {
            let (acceptor, service) = (acceptor.clone(), TowerToHyperService::new(router.clone()));
            async move {
                let stream = TokioIo::new(acceptor.accept(tcp).await?);
                let serving = hyper::server::conn::http1::Builder::new().serve_connection(stream, service);
                Ok(serving.with_upgrades().await?)
            }
        })
        .await
    }
}

/// A client that trusts the CA of a file, and shows a certificate if it has one (certificate and key).
pub fn client(ca: &Path, shown: Option<[&Path; 2]>, protocol: Option<&str>) -> Result<Arc<ClientConfig>> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots(ca)?);
    let mut config = match shown {
        None => config.with_no_client_auth(),
        Some([certificate, key]) => {
            let chain = vec![CertificateDer::from_pem_file(certificate)?];
            config.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
        }
    };
    config.alpn_protocols = protocol.iter().map(|name| name.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}
