//! Owns the cluster's certificates and the kubeconfigs made of them: one CA for everything, as kubeadm's default has it.
//! Called by the control plane and the node.
//! Must never be used outside the lab: the keys lie readable in its directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType, date_time_ymd,
};
use serde_json::json;

use super::{
    addresses::{at, socket},
    place::Place,
};
use crate::{certs::authority, kube::kubeconfig};

/// A CA and what it signed.
pub struct Pki {
    directory: PathBuf,
    ca: Issuer<'static, KeyPair>,
}

/// Who has a kubeconfig: the file's name, the user, the group.
const USERS: [(&str, &str, &str); 7] = [
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy-server", "system:konnectivity-server", ""),
    ("worker-1", "system:node:worker-1", "system:nodes"),
    ("worker-2", "system:node:worker-2", "system:nodes"),
    ("kube-proxy", "system:kube-proxy", ""),
];

impl Pki {
    /// Makes all of it.
    pub fn new(place: &Place) -> Result<Pki> {
        let directory = place.directory.join("pki");
        fs::create_dir_all(&directory)?;
        let (ca, pem) = authority("cluster CA")?;
        fs::write(directory.join("ca.crt"), pem)?;
        let pki = Pki { directory, ca };
        let api = [at().control, at().api_service, at().loopback];
        let api = [&api[..], &["kubernetes", "kubernetes.default", "kubernetes.default.svc"]].concat();
        pki.sign("apiserver", "kube-apiserver", "", &api)?;
        pki.sign("proxy-server-tls", "proxy-server", "", &[at().control])?;
        pki.sign("apiserver-kubelet-client", "kube-apiserver-kubelet-client", "system:masters", &[])?;
        pki.sign("front-proxy-client", "front-proxy-client", "", &[])?;
        pki.sign("service-account", "service-accounts", "", &[])?;
        for (name, address) in [("worker-1", at().node), ("worker-2", at().second)] {
            pki.sign(&format!("kubelet-{name}"), &format!("system:node:{name}"), "system:nodes", &[address, name])?;
        }
        for (file, user, group) in USERS {
            pki.sign(file, user, group, &[])?;
            let [certificate, key, config] =
                ["crt", "key", "kubeconfig"].map(|kind| pki.path(&format!("{file}.{kind}")));
            let proof = json!({"client-certificate": certificate, "client-key": key});
            kubeconfig(&config, socket(at().control, 6443)?, &pki.path("ca.crt"), &proof)?;
        }
        Ok(pki)
    }

    /// A file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A server's certificate for these names.
    pub fn serving(&self, file: &str, names: &[&str]) -> Result<()> {
        self.sign(file, file, "", names)
    }

    fn sign(&self, file: &str, user: &str, group: &str, names: &[&str]) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        if !group.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        let name = |name: &&str| match name.parse() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_) => Ok(SanType::DnsName((*name).try_into()?)),
        };
        params.subject_alt_names = names.iter().map(name).collect::<Result<_>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(4096, 1, 1));
        fs::write(self.path(&format!("{file}.crt")), params.signed_by(&key, &self.ca)?.pem())?;
        Ok(fs::write(self.path(&format!("{file}.key")), key.serialize_pem())?)
    }

    /// A file's path as text.
    pub fn text(&self, name: &str) -> Result<String> {
        text(&self.path(name))
    }
}

/// A path as text.
pub fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}
