//! Owns the cluster's certificates and the kubeconfigs made of them: one CA for everything, as kubeadm's default has it.
//! Called by `control` and `node`.
//! Must never be used outside the lab: the keys lie readable in its directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType, date_time_ymd,
};

use crate::{
    addresses::{at, socket},
    place::Place,
};

/// A CA and what it signed.
pub(crate) struct Pki {
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
    pub(crate) fn new(place: &Place) -> Result<Pki> {
        let directory = place.directory.join("pki");
        fs::create_dir_all(&directory)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "cluster CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date_time_ymd(2019, 1, 1), date_time_ymd(4096, 1, 1));
        let pem = params.self_signed(&key)?.pem();
        fs::write(directory.join("ca.crt"), pem)?;
        let pki = Pki { directory, ca: Issuer::new(params, key) };

        let api = [
            at().control,
            at().api_service,
            at().loopback,
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
        ];
        pki.sign("apiserver", "kube-apiserver", "", &api)?;
        pki.sign("proxy-server-tls", "proxy-server", "", &[at().control])?;
        pki.sign("apiserver-kubelet-client", "kube-apiserver-kubelet-client", "system:masters", &[])?;
        pki.sign("front-proxy-client", "front-proxy-client", "", &[])?;
        pki.sign("service-account", "service-accounts", "", &[])?;
        pki.sign("kubelet-1-tls", "system:node:worker-1", "system:nodes", &[at().node, "worker-1"])?;
        pki.sign("kubelet-2-tls", "system:node:worker-2", "system:nodes", &[at().second, "worker-2"])?;
        for (file, user, group) in USERS {
            pki.sign(file, user, group, &[])?;
            pki.kubeconfig(file)?;
        }
        Ok(pki)
    }

    /// A file.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A server's certificate for these names.
    pub(crate) fn serving(&self, file: &str, names: &[&str]) -> Result<()> {
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

    fn kubeconfig(&self, user: &str) -> Result<()> {
        let (ca, certificate, key) =
            (self.text("ca.crt")?, self.text(&format!("{user}.crt"))?, self.text(&format!("{user}.key"))?);
        let server = socket(at().control, 6443)?;
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
            clusters: [{{name: lab, cluster: {{server: 'https://{server}', certificate-authority: {ca}}}}}]\n\
            users: [{{name: lab, user: {{client-certificate: {certificate}, client-key: {key}}}}}]\n\
            contexts: [{{name: lab, context: {{cluster: lab, user: lab}}}}]\n"
        );
        Ok(fs::write(self.path(&format!("{user}.kubeconfig")), text)?)
    }

    /// A file's path as text.
    pub(crate) fn text(&self, name: &str) -> Result<String> {
        text(&self.path(name))
    }
}

/// A path as text.
pub(crate) fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is no text", path.display()))
}
