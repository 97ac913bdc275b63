//! Owns the lab's certificates: one CA, and what is wrong on purpose.
//! Called by `lab` and `server`.
//! Must never be used outside a lab: the keys lie readable in its directory.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use crate::lab::net::Who;

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
    ca: Issuer<'static, KeyPair>,
    other: Issuer<'static, KeyPair>,
}

impl Certs {
    /// Makes the CA, the agent's and the kubelet's certificate.
    pub fn new(directory: &Path) -> Result<Certs> {
        std::fs::create_dir_all(directory)?;
        let (ca, pem) = authority("lab CA")?;
        let (other, _) = authority("another CA")?;
        let certs = Certs { directory: directory.to_path_buf(), ca, other };
        std::fs::write(certs.path("ca.crt"), pem)?;
        let node = [
            SanType::IpAddress(Who::Node.v4().into()),
            SanType::IpAddress(Who::Node.v6().into()),
            SanType::DnsName("node".try_into()?),
        ];
        certs.agent()?;
        certs.sign("kubelet", &certs.ca, node.to_vec(), ExtendedKeyUsagePurpose::ServerAuth, FAR)?;
        Ok(certs)
    }

    /// A new certificate for the agent, of this CA.
    pub fn agent(&self) -> Result<()> {
        self.sign("agent", &self.ca, Vec::new(), ExtendedKeyUsagePurpose::ClientAuth, FAR)
    }

    /// Gives an agent, ours or the upstream one, its certificate and the CA by their options.
    pub fn give_to_agent(&self, agent: &mut Command) {
        for (option, file) in [("ca-cert", "ca.crt"), ("agent-cert", "agent.crt"), ("agent-key", "agent.key")] {
            agent.arg(format!("--{option}={}", self.path(file).display()));
        }
    }

    /// Gives the real proxy-server its certificate for agents, and the CA, by their options.
    pub fn give_to_server(&self, server: &mut Command) {
        for (option, file) in
            [("cluster-cert", "server.crt"), ("cluster-key", "server.key"), ("cluster-ca-cert", "ca.crt")]
        {
            server.arg(format!("--{option}={}", self.path(file).display()));
        }
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
        let names = if kind == ServerCert::WrongName {
            vec![SanType::DnsName("elsewhere.example".try_into()?)]
        } else {
            vec![SanType::IpAddress(Who::ControlPlane.v4().into()), SanType::DnsName(NAME.try_into()?)]
        };
        let issuer = if kind == ServerCert::OtherCa { &self.other } else { &self.ca };
        let end = if kind == ServerCert::Expired { 2020 } else { FAR };
        self.sign("server", issuer, names, ExtendedKeyUsagePurpose::ServerAuth, end)
    }

    fn sign(
        &self,
        name: &str,
        issuer: &Issuer<'static, KeyPair>,
        names: Vec<SanType>,
        usage: ExtendedKeyUsagePurpose,
        end: i32,
    ) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = named(name);
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(end, 1, 1));
        // A serial number is positive.
        let serial = [&[1][..], &rand::random::<[u8; 8]>()].concat();
        params.serial_number = Some(SerialNumber::from(serial.clone()));
        let certificate = params.signed_by(&key, issuer)?;
        std::fs::write(self.path(&format!("{name}.serial")), serial)?;
        std::fs::write(self.path(&format!("{name}.crt")), certificate.pem())?;
        Ok(std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem())?)
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

pub(crate) fn authority(name: &str) -> Result<(Issuer<'static, KeyPair>, String)> {
    let key = KeyPair::generate()?;
    let mut params = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}
