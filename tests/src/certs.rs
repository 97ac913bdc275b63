//! Owns the lab's certificates: one CA, and what is wrong on purpose.
//! Called by `lab` and `server`.
//! Must never be used outside a lab: the keys lie readable in its directory.

use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};

use crate::net::Who;

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
        certs.sign("agent", &certs.ca, Vec::new(), ExtendedKeyUsagePurpose::ClientAuth, 4096)?;
        certs.sign("kubelet", &certs.ca, node.to_vec(), ExtendedKeyUsagePurpose::ServerAuth, 4096)?;
        Ok(certs)
    }

    /// A file of the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes `server.crt` and `server.key`.
    pub fn server(&self, kind: ServerCert) -> Result<()> {
        let here = SanType::IpAddress(Who::ControlPlane.v4().into());
        let names = if kind == ServerCert::WrongName {
            vec![SanType::DnsName("elsewhere.example".try_into()?)]
        } else {
            vec![here]
        };
        let issuer = if kind == ServerCert::OtherCa { &self.other } else { &self.ca };
        let end = if kind == ServerCert::Expired { 2020 } else { 4096 };
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
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(end, 1, 1));
        let certificate = params.signed_by(&key, issuer)?;
        std::fs::write(self.path(&format!("{name}.crt")), certificate.pem())?;
        std::fs::write(self.path(&format!("{name}.key")), key.serialize_pem())?;
        Ok(())
    }
}

fn authority(name: &str) -> Result<(Issuer<'static, KeyPair>, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}
