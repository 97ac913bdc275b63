//! Owns the end of a cluster by somebody's hand, and what is said to who tries it meanwhile.
//! Called by `main`.
//! Must never leave anything of a cluster behind, however early it is interrupted.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    time::Duration,
};

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    addresses::{at, socket},
    control::binary,
    place::{Place, Where},
    say,
};

/// Says what to try.
pub(crate) fn try_it(place: &Place) -> Result<()> {
    let (directory, kubectl) = (place.directory.display(), binary("kubectl")?);
    let kubelet = socket(at().node, 10250)?;
    say("\nThe cluster stays until ctrl-c, which removes all of it. In another shell, as root:\n")?;
    say(&format!("  export KUBECONFIG={directory}/pki/admin.kubeconfig"))?;
    say(&format!("  alias k='{} {}'", place.enter(Where::Control), kubectl.display()))?;
    for line in [
        "k get pods -A -o wide",
        "k -n kube-system exec ds/nodeguard -- nodeguard status",
        "k exec -it web -c web -- sh                                   # through the tunnel; so are logs, cp, port-forward",
        "k get --raw /api/v1/namespaces/default/pods/web:8080/proxy/   # ok: tunnel.dial names 8080",
        "k get --raw /api/v1/namespaces/default/pods/web:8081/proxy/   # refused: it does not name 8081",
        "k -n kube-system logs ds/nodeguard --tail=5                   # a record for each dial, and each denial",
        "k -n kube-system edit configmap nodeguard-policy              # in force as soon as kubelet has written it; try a broken one",
    ] {
        say(&format!("  {line}"))?;
    }
    // The control plane's first address is not let out by its own packet filter: that would prove nothing about the guard.
    for (who, source, what) in [
        (Where::Neighbour, at().neighbour, "a neighbour: no answer"),
        (Where::Control, at().control_direct, "the control plane past the tunnel: no answer"),
        (Where::Neighbour, at().scraper, "an address that the policy names: Unauthorized, says kubelet"),
    ] {
        let curl = format!("curl -m 2 -k --interface {source} https://{kubelet}/healthz");
        say(&format!("  {} {curl}   # {what}", place.enter(who)))?;
    }
    say("")
}

/// SIGINT and SIGTERM: while the cluster is only kept they end the wait, before that the cluster.
pub(crate) struct Interrupt {
    came: Receiver<()>,
    waits: Arc<AtomicBool>,
    removes: Arc<AtomicBool>,
}

impl Interrupt {
    /// From now on.
    pub(crate) fn of(place: &Place) -> Result<Interrupt> {
        let (send, came) = channel();
        let waits = Arc::new(AtomicBool::new(false));
        let removes = Arc::new(AtomicBool::new(false));
        let (waiting, removing, id) = (Arc::clone(&waits), Arc::clone(&removes), place.id.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut interrupt, mut terminate) = {
            let _in_it = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
            });
            if waiting.load(Ordering::Relaxed) {
                let _ = send.send(());
                return;
            }
            removing.store(true, Ordering::Relaxed);
            drop(say("\ninterrupted: removing the cluster"));
            lab::sweep::remove(&id);
            // As a shell says of a command that SIGINT ended.
            std::process::exit(130);
        });
        Ok(Interrupt { came, waits, removes })
    }

    /// Does not come back where the cluster is being removed: that its parts end is no error then.
    pub(crate) fn let_it_end(&self) {
        while self.removes.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether one came, waiting so long for it. From the first call on it ends nothing else.
    pub(crate) fn came(&self, patience: Duration) -> bool {
        self.waits.store(true, Ordering::Relaxed);
        !matches!(self.came.recv_timeout(patience), Err(RecvTimeoutError::Timeout))
    }
}
