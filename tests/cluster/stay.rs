//! Owns the end of a cluster by an interrupt, and what is printed for somebody who tries the cluster meanwhile.
//! Called by `main`.
//! Must never leave anything of a cluster behind, however early it is interrupted.

use std::{
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
    time::Duration,
};

use anyhow::Result;
use lab::cluster::{Place, Where, at, binary, kubelet, say};
use tokio::signal::unix::{SignalKind, signal};

/// The exit code after an interrupt: at first what a shell reports of a command that SIGINT ended.
static CODE: AtomicI32 = AtomicI32::new(130);
/// Whether the cluster is being removed.
static REMOVES: AtomicBool = AtomicBool::new(false);

/// Prints what to try. From here on an interrupt is the ordinary end.
pub(crate) fn try_it(place: &Place, good: bool) -> Result<()> {
    CODE.store(i32::from(!good), Ordering::Relaxed);
    let (directory, kubectl) = (place.directory.display(), binary("kubectl")?);
    let kubelet = kubelet()?;
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

/// From now on SIGINT and SIGTERM remove the cluster and end this process.
pub(crate) fn remove_on_interrupt(place: &Place) -> Result<()> {
    let id = place.id.clone();
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
        REMOVES.store(true, Ordering::Relaxed);
        drop(say("\ninterrupted: removing the cluster"));
        lab::sweep::remove(&id);
        std::process::exit(CODE.load(Ordering::Relaxed));
    });
    Ok(())
}

/// Does not return while the cluster is being removed: that its parts end is no error then.
pub(crate) fn let_it_end() {
    while REMOVES.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
    }
}
