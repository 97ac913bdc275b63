//! Owns the lab's certificates: one CA, and what is wrong on purpose; TLS with them, of servers and of clients, and HTTPS on top of it.
//! Called by `lab`, `servers`, the fake API server and clients in Rust; the cluster lab signs its own with the same words.
//! Must never be used outside a lab: the keys lie readable in its directory.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use axum::Router;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;

use crate::{lab::net::Who, servers::Listener};

/// The year in which a good certificate ends.
const FAR: i32 = 4096;

/// A name that the proxy-server's certificate is good for, beside its address.
pub const NAME: &str = "proxies.example";

/// The CAs of a file, as what to trust.
pub fn roots(file: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file)? {
        roots.add(certificate?)?;
    }
    Ok(roots)
}

/// The certificate that the proxy-server shows to agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerCert {
    /// As it should be.
    Good,
    /// Of a CA that nobody trusts.
    OtherCa,
    /// Over since 2020.
    Expired,
    /// For another name.
    WrongName,
}

/// A CA and what it signed, in a directory.
pub struct Certs {
    directory: PathBuf,
    ca: Authority,
    other: Authority,
}

impl Certs {
    /// Makes the CA, the agent's and the kubelet's certificate.
    pub fn new(directory: &Path) -> Result<Certs> {
        std::fs::create_dir_all(directory)?;
        let (ca, pem) = authority("lab CA")?;
        let (other, _) = authority("another CA")?;
        let certs = Certs { directory: directory.to_path_buf(), ca, other };
        std::fs::write(certs.path("ca.crt"), pem)?;
        certs.agent()?;
        let node = [&*Who::Node.v4().to_string(), &Who::Node.v6().to_string(), "node"];
        certs.sign("kubelet", &certs.ca, &node, ExtendedKeyUsagePurpose::ServerAuth, FAR)?;
        Ok(certs)
    }

    /// A new certificate for the agent, of this CA.
    pub fn agent(&self) -> Result<()> {
        self.sign("agent", &self.ca, &[], ExtendedKeyUsagePurpose::ClientAuth, FAR)
    }

    /// Options that name files.
    pub fn options<const N: usize>(&self, of: [(&str, &str); N]) -> [String; N] {
        of.map(|(option, file)| format!("--{option}={}", self.path(file).display()))
    }

    /// The options of an agent, ours or the upstream one: its certificate and the CA.
    pub fn of_agent(&self) -> [String; 3] {
        self.options([("ca-cert", "ca.crt"), ("agent-cert", "agent.crt"), ("agent-key", "agent.key")])
    }

    /// From now on everything is signed by a new CA; returns its certificate, which is written nowhere.
    pub fn new_authority(&mut self) -> Result<String> {
        let (ca, pem) = authority("lab CA")?;
        self.ca = ca;
        Ok(pem)
    }

    /// A list that revokes what `NAME.crt` says, or nobody, good until such a year.
    pub fn revocations(&self, revoked: Option<&str>, end: i32) -> Result<String> {
        let from = date_time_ymd(2019, 1, 1);
        let serial = revoked.map(|name| std::fs::read(self.path(&format!("{name}.serial")))).transpose()?;
        let revoked_certs = serial.into_iter().map(|serial| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: from,
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: from,
            next_update: date_time_ymd(end, 1, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.ca)?.pem()?)
    }

    /// A file of the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes `server.crt` and `server.key`.
    pub fn server(&self, kind: ServerCert) -> Result<()> {
        let address = Who::ControlPlane.v4().to_string();
        let names = if kind == ServerCert::WrongName { &["elsewhere.example"][..] } else { &[&*address, NAME] };
        let issuer = if kind == ServerCert::OtherCa { &self.other } else { &self.ca };
        let end = if kind == ServerCert::Expired { 2020 } else { FAR };
        self.sign("server", issuer, names, ExtendedKeyUsagePurpose::ServerAuth, end)
    }

    fn sign(
        &self,
        name: &str,
        issuer: &Authority,
        names: &[&str],
        usage: ExtendedKeyUsagePurpose,
        end: i32,
    ) -> Result<()> {
        let mut params = named(name, names)?;
        params.extended_key_usages = vec![usage];
        params.not_after = date_time_ymd(end, 1, 1);
        // A serial number is positive.
        let serial = [&[1][..], &rand::random::<[u8; 8]>()].concat();
        params.serial_number = Some(SerialNumber::from(serial.clone()));
        std::fs::write(self.path(&format!("{name}.serial")), serial)?;
        issue(&self.path(name), &params, issuer)
    }
}

/// What is good for these names and addresses until long after every run.
pub(crate) fn named(name: &str, names: &[&str]) -> Result<CertificateParams> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    let name = |name: &&str| match name.parse() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => Ok(SanType::DnsName((*name).try_into()?)),
    };
    params.subject_alt_names = names.iter().map(name).collect::<Result<_>>()?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(FAR, 1, 1));
    Ok(params)
}

/// Signs a new key for it; writes the file's `crt` and `key`.
pub(crate) fn issue(file: &Path, params: &CertificateParams, issuer: &Authority) -> Result<()> {
    let key = KeyPair::generate()?;
    std::fs::write(file.with_extension("crt"), params.signed_by(&key, issuer)?.pem())?;
    Ok(std::fs::write(file.with_extension("key"), key.serialize_pem())?)
}

/// A CA that signs.
pub(crate) type Authority = Issuer<'static, KeyPair>;

pub(crate) fn authority(name: &str) -> Result<(Authority, String)> {
    let key = KeyPair::generate()?;
    let mut params = named(name, &[])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}

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
