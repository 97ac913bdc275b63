//! Owns the credentials in use: CA, client certificate, token and CRL, read again whenever a file changes.
//! Called by `Tunnel::run`; each connection attempt uses the current ones.
//! Must never replace working credentials with a broken file: that is reported, and the last good credentials stay in use.

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use rustls::ClientConfig;
use tokio::sync::Notify;
use tonic::metadata::AsciiMetadataValue;

use crate::{
    net::tls::{CredentialBytes, CredentialFiles, TlsError, TlsOptions},
    sys::{file_watch::FileWatch, lock::lock},
};

/// How long the directories must be quiet before the files are read: a certificate and its key are two writes.
const QUIET: Duration = Duration::from_millis(50);
/// How long certificate and key may not match before that is an error: a rotation may be half done.
const HALF_DONE: Duration = Duration::from_secs(1);

/// The credentials of a connection.
pub(crate) struct Credentials {
    /// The generation: a stream of an older one is replaced.
    pub(crate) number: u64,
    /// The TLS configuration.
    pub(crate) client: Arc<ClientConfig>,
    /// The `authorization` header.
    pub(crate) bearer: Option<AsciiMetadataValue>,
}

/// Why there are no credentials.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The files cannot be used, and there are no earlier credentials.
    #[error(transparent)]
    Unusable(Arc<TlsError>),
    /// The files are not read yet.
    #[error("the credential files are not read yet")]
    Unread,
}

/// The current credentials, and what is wrong with the files if anything is.
pub(crate) struct CredentialStore {
    pub(crate) files: CredentialFiles,
    options: TlsOptions,
    current: ArcSwapOption<Credentials>,
    held: Mutex<Option<CredentialBytes>>,
    broken: Mutex<Option<Arc<TlsError>>>,
    failures: AtomicU64,
}

impl CredentialStore {
    /// Nothing read yet.
    pub(crate) fn new(files: CredentialFiles, options: TlsOptions) -> CredentialStore {
        CredentialStore {
            files,
            options,
            current: ArcSwapOption::empty(),
            held: Mutex::default(),
            broken: Mutex::default(),
            failures: AtomicU64::new(0),
        }
    }

    /// The credentials in use, or why there are none.
    pub(crate) fn current(&self) -> Result<Arc<Credentials>, CredentialsError> {
        let broken = || lock(&self.broken).clone().map_or(CredentialsError::Unread, CredentialsError::Unusable);
        self.current.load_full().ok_or_else(broken)
    }

    /// The generation in use; 0 if there is none.
    pub(crate) fn number(&self) -> u64 {
        self.current.load().as_ref().map_or(0, |credentials| credentials.number)
    }

    /// What is wrong with the files now.
    pub(crate) fn broken(&self) -> Option<String> {
        lock(&self.broken).as_ref().map(ToString::to_string)
    }

    /// How often the files became unusable.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Reads the files now.
    pub(crate) fn load(&self) {
        if let Err(error) = self.take() {
            self.report(error);
        }
    }

    /// Follows the files and notifies about new credentials. Never ends.
    pub(crate) async fn watch(&self, changed: &Notify) {
        let paths: Vec<&Path> = self.files.all().map(|(_, path)| path).collect();
        let mut changes = FileWatch::start(&paths);
        loop {
            changes.next(QUIET).await;
            let mut taken = self.take();
            if taken.is_err() {
                tokio::time::sleep(HALF_DONE).await;
                taken = self.take();
            }
            match taken {
                Ok(true) => changed.notify_one(),
                Ok(false) => {}
                Err(error) => self.report(error),
            }
        }
    }

    /// Reads the files and uses what they hold if it is new and good. Returns whether it was.
    fn take(&self) -> Result<bool, TlsError> {
        let contents = CredentialBytes::read(&self.files)?;
        let mut held = lock(&self.held);
        if held.as_ref() == Some(&contents) {
            if lock(&self.broken).take().is_some() {
                tracing::info!("the certificate files on disk match the ones in use again");
            }
            return Ok(false);
        }
        let (client, bearer) = (Arc::new(contents.client(&self.options)?), contents.bearer()?);
        let number = self.number() + 1;
        self.current.store(Some(Arc::new(Credentials { number, client, bearer })));
        *held = Some(contents);
        *lock(&self.broken) = None;
        if number > 1 {
            tracing::info!(
                number,
                "new certificates or token: every stream is replaced, the old ones finish their open dials"
            );
        }
        Ok(true)
    }

    fn report(&self, error: TlsError) {
        let mut broken = lock(&self.broken);
        if broken.as_ref().is_some_and(|before| before.to_string() == error.to_string()) {
            return;
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        let in_use = self.number();
        tracing::error!(%error, in_use, "the certificates or the token cannot be used; the previous ones stay in use");
        *broken = Some(Arc::new(error));
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn pair() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (CertificateParams::default().self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn a_broken_file_changes_nothing_and_a_mended_one_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let write = |name: &str, text: &str| std::fs::write(at(name), text).unwrap();
        let write_all = |all: &[(&str, &str)]| all.iter().for_each(|(name, text)| write(name, text));
        let (one, other) = (pair(), pair());
        write_all(&[("ca.crt", &one.0), ("c", &one.0), ("k", &one.1), ("t", "\n token \n")]);
        let files =
            CredentialFiles { ca: at("ca.crt"), identity: Some((at("c"), at("k"))), token: Some(at("t")), crl: None };
        let credentials = CredentialStore::new(files, TlsOptions::default());
        credentials.load();
        let first = credentials.current().unwrap();
        assert_eq!((first.number, first.bearer.as_ref().unwrap().to_str().unwrap()), (1, "Bearer token"));

        // Half a rotation, a lost file, an empty token, garbage: each is reported once, none is used.
        let breaks: [(&str, &dyn Fn()); 4] = [
            ("--agent-cert and --agent-key", &|| write("c", &other.0)),
            ("--ca-cert", &|| write("ca.crt", "")),
            ("--service-account-token-path", &|| write("t", " \n")),
            ("--agent-key", &|| std::fs::remove_file(at("k")).unwrap()),
        ];
        for (index, (what, breaks)) in breaks.iter().enumerate() {
            breaks();
            credentials.load();
            credentials.load();
            assert!(credentials.broken().unwrap().contains(what), "{what}: {:?}", credentials.broken());
            assert_eq!((credentials.number(), credentials.failures()), (1, index as u64 + 1));
            write_all(&[("ca.crt", &one.0), ("c", &one.0), ("k", &one.1), ("t", "token")]);
            credentials.load();
            assert_eq!((credentials.number(), credentials.broken()), (1, None));
        }
        write_all(&[("c", &other.0), ("k", &other.1)]);
        credentials.load();
        write("t", "another");
        credentials.load();
        assert_eq!((credentials.number(), credentials.failures()), (3, 4));
    }
}
