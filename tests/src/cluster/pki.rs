//! Owns the cluster's certificates and the kubeconfigs made of them: one CA for everything, as kubeadm's default has it.
//! Called by the control plane and the node.
//! Must never be used outside the lab: the keys lie readable in its directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{DnType, ExtendedKeyUsagePurpose, KeyUsagePurpose};
use serde_json::json;

use super::{
    addresses::{at, socket},
    place::Place,
};
use crate::{
    certs::{Authority, authority, issue, named},
    kube::kubeconfig,
};

/// A CA and what it signed.
pub struct Pki {
    directory: PathBuf,
    ca: Authority,
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

    /// A certificate of a user in a group (`""`: in none), also a server's for these names.
    pub fn sign(&self, file: &str, user: &str, group: &str, names: &[&str]) -> Result<()> {
        let mut params = named(user, names)?;
        if !group.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        issue(&self.path(file), &params, &self.ca)
    }
}

/// A path as text.
pub fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8", path.display()))
}
