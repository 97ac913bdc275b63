//! Owns what this agent proves itself with and whom it trusts: read anew whenever a file changes.
//! Called by `Tunnel::run`; each connection attempt takes what is current.
//! Must never let a broken file take the place of what works: that is told, and the last good material stays in use.

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
    net::tls::{Contents, Files, Manner, TlsError},
    sys::{file_watch::Changes, lock::lock},
};

/// How long the directories have to be quiet before the files are read: a certificate and its key are two writes.
const QUIET: Duration = Duration::from_millis(50);
/// How long files may not fit together before that is told: a rotation may be half done.
const HALF_DONE: Duration = Duration::from_secs(1);

/// What a connection is made with.
pub(crate) struct Material {
    /// Counts up: a stream with an older number is replaced.
    pub(crate) number: u64,
    /// TLS.
    pub(crate) client: Arc<ClientConfig>,
    /// The token.
    pub(crate) bearer: Option<AsciiMetadataValue>,
}

/// Keeps it current.
pub(crate) struct Keeper {
    pub(crate) files: Files,
    manner: Manner,
    current: ArcSwapOption<Material>,
    held: Mutex<Option<Contents>>,
    broken: Mutex<Option<String>>,
    failures: AtomicU64,
}

impl Keeper {
    /// Nothing read yet.
    pub(crate) fn new(files: Files, manner: Manner) -> Keeper {
        Keeper {
            files,
            manner,
            current: ArcSwapOption::empty(),
            held: Mutex::default(),
            broken: Mutex::default(),
            failures: AtomicU64::new(0),
        }
    }

    /// What is in use; or why there is nothing.
    pub(crate) fn current(&self) -> Result<Arc<Material>, String> {
        self.current.load_full().ok_or_else(|| self.broken().unwrap_or_else(|| "the files are not read yet".to_owned()))
    }

    /// The number of what is in use; 0 where nothing is.
    pub(crate) fn number(&self) -> u64 {
        self.current.load().as_ref().map_or(0, |material| material.number)
    }

    /// What is wrong with what the files hold now.
    pub(crate) fn broken(&self) -> Option<String> {
        lock(&self.broken).clone()
    }

    /// How often files were broken so far.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Reads the files now.
    pub(crate) fn load(&self) {
        if let Err(error) = self.take() {
            self.tell(error.to_string());
        }
    }

    /// Follows the files for good; tells whoever waits when there is something new.
    pub(crate) async fn watch(&self, changed: &Notify) {
        let paths: Vec<&Path> = self.files.all().map(|(_, path)| path).collect();
        let mut changes = Changes::of(&paths);
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
                Err(error) => self.tell(error.to_string()),
            }
        }
    }

    /// Takes what the files hold if that is new and good; whether it was.
    fn take(&self) -> Result<bool, TlsError> {
        let contents = Contents::read(&self.files)?;
        let mut held = lock(&self.held);
        if held.as_ref() == Some(&contents) {
            if lock(&self.broken).take().is_some() {
                tracing::info!("the files hold again what is in use");
            }
            return Ok(false);
        }
        let (client, bearer) = (Arc::new(contents.client(&self.manner)?), contents.bearer()?);
        let number = self.number() + 1;
        self.current.store(Some(Arc::new(Material { number, client, bearer })));
        *held = Some(contents);
        *lock(&self.broken) = None;
        if number > 1 {
            tracing::info!(
                number,
                "new certificates or token: every stream is replaced, the old ones serve what they carry"
            );
        }
        Ok(true)
    }

    fn tell(&self, error: String) {
        let mut broken = lock(&self.broken);
        if broken.as_ref() == Some(&error) {
            return;
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        let in_use = self.number();
        tracing::error!(error, in_use, "the certificates or the token cannot be used; what was in use before stays so");
        *broken = Some(error);
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
        let files = Files { ca: at("ca.crt"), identity: Some((at("c"), at("k"))), token: Some(at("t")), crl: None };
        let keeper = Keeper::new(files, Manner::default());
        keeper.load();
        let first = keeper.current().unwrap();
        assert_eq!((first.number, first.bearer.as_ref().unwrap().to_str().unwrap()), (1, "Bearer token"));

        // Half a rotation, a lost file, an empty token, garbage: each is told once, none is taken.
        let breaks: [(&str, &dyn Fn()); 4] = [
            ("--agent-cert and --agent-key", &|| write("c", &other.0)),
            ("--ca-cert", &|| write("ca.crt", "")),
            ("--service-account-token-path", &|| write("t", " \n")),
            ("--agent-key", &|| std::fs::remove_file(at("k")).unwrap()),
        ];
        for (index, (what, breaks)) in breaks.iter().enumerate() {
            breaks();
            keeper.load();
            keeper.load();
            assert!(keeper.broken().unwrap().contains(what), "{what}: {:?}", keeper.broken());
            assert_eq!((keeper.number(), keeper.failures()), (1, index as u64 + 1));
            write_all(&[("ca.crt", &one.0), ("c", &one.0), ("k", &one.1), ("t", "token")]);
            keeper.load();
            assert_eq!((keeper.number(), keeper.broken()), (1, None));
        }
        write_all(&[("c", &other.0), ("k", &other.1)]);
        keeper.load();
        write("t", "another");
        keeper.load();
        assert_eq!((keeper.number(), keeper.failures()), (3, 4));
    }
}
