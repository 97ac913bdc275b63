//! Owns making sure that a connected backend is the address that was judged, and its listener the one that was checked.
//! Called by `serve`, after the connection and before a byte passes.
//! Must never let a dial pass that is known to end elsewhere: something on this node may translate addresses after the judgement.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use guard_policy::{authorize::Permit, refusal::Refusal};
use tokio::{net::TcpStream, time::sleep};

use crate::{
    dial::{backend::BackendError, failure::Failure, kubelet::check::Certificates},
    kernel::{conntrack, cut::sock_diag},
};

/// The pauses between looks for the other end on this node: it may take the last packet of the handshake on another CPU.
const PAUSES: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(50)];

/// Whether it was already reported that the kernel does not say where connections end.
static REPORTED: AtomicBool = AtomicBool::new(false);

/// Where a connection ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// At the address that was judged, as far as this node knows.
    Judged,
    /// Elsewhere; at this address, if it is known.
    Elsewhere(Option<SocketAddr>),
}

/// Fails if the connection ends elsewhere than at the permit's address, or at another listener than the one that was checked.
pub(crate) async fn arrives(backend: &TcpStream, permit: &Permit, certificates: &Certificates) -> Result<(), Failure> {
    // A Service's address is meant to be translated.
    if permit.to_service() {
        return Ok(());
    }
    let address = permit.address();
    let refused = |refusal, detail| Err(Failure::Refused { refusal, detail });
    let unreachable = |error: io::Error| Failure::Unreachable { address, cause: BackendError::Socket(error) };
    let local = backend.local_addr().map_err(unreachable)?;
    let here = permit.own() || address.ip().is_loopback() || local.ip() == address.ip();
    let end = if here { end_here(local, address).await } else { end_there(local, address) };
    match end {
        Ok(End::Judged) => {}
        Ok(End::Elsewhere(at)) => {
            // A backend that has reset the connection has no other end any more.
            if let Some(error) = backend.take_error().map_err(unreachable)? {
                return Err(unreachable(error));
            }
            return refused(Refusal::Translated, at.map(|at| format!("it ends at {at}")));
        }
        Err(error) if !permit.demands().certificates.is_empty() => {
            return refused(Refusal::Translated, Some(format!("the kernel does not say where it ends ({error})")));
        }
        Err(error) if !REPORTED.swap(true, Ordering::Relaxed) => {
            tracing::warn!(%address, %error, "the kernel does not say where connections end: a dial that is translated on this node is not noticed");
        }
        Err(_) => {}
    }
    match permit.demands().certificates.iter().find(|demand| !certificates.still_listens(address, demand)) {
        Some(_) => refused(Refusal::KubeletCertificate, Some("what listens there has just changed".to_owned())),
        None => Ok(()),
    }
}

/// For an address of this node, the other end is a socket of this network namespace, whatever translates addresses and how.
async fn end_here(local: SocketAddr, address: SocketAddr) -> io::Result<End> {
    for pause in PAUSES {
        if !pause.is_zero() {
            sleep(pause).await;
        }
        if sock_diag::has_connection(address, local)? {
            return Ok(End::Judged);
        }
    }
    Ok(End::Elsewhere(None))
}

/// For any other address, this node knows of its own translations: the socket has another remote end (a connect hook), or connection tracking
/// has another destination (iptables, nftables, IPVS).
fn end_there(local: SocketAddr, address: SocketAddr) -> io::Result<End> {
    if !sock_diag::has_connection(local, address)? {
        return Ok(End::Elsewhere(None));
    }
    match conntrack::destination(local, address) {
        Ok(Some(at)) if (at.ip(), at.port()) != (address.ip(), address.port()) => Ok(End::Elsewhere(Some(at))),
        Ok(_) => Ok(End::Judged),
        Err(error) => {
            // Without CAP_NET_ADMIN, as for `agent`, or without nf_conntrack_netlink.
            tracing::debug!(%address, %error, "connection tracking does not say where a connection goes");
            Ok(End::Judged)
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    #[tokio::test]
    async fn the_other_end_of_a_connection_on_this_node_is_found_however_it_is() {
        for listen in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(listen).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let to: &[&str] = if listen == "[::]:0" {
                &["127.0.0.1", "127.0.0.9", "::1"]
            } else {
                &[listen.trim_end_matches(":0").trim_matches(['[', ']'])]
            };
            for to in to {
                let address = SocketAddr::new(to.parse().unwrap(), port);
                let mut backend = TcpStream::connect(address).await.unwrap();
                let local = backend.local_addr().unwrap();
                // Not yet accepted, accepted, and closed by the backend.
                assert_eq!(end_here(local, address).await.unwrap(), End::Judged, "{address}");
                let (accepted, _) = listener.accept().await.unwrap();
                assert_eq!(end_here(local, address).await.unwrap(), End::Judged, "{address}");
                assert_eq!(end_there(local, address).unwrap(), End::Judged, "{address}");
                drop(accepted);
                assert_eq!(backend.read(&mut [0]).await.unwrap(), 0);
                assert_eq!(end_here(local, address).await.unwrap(), End::Judged, "{address}");
                // A listener alone is no connection, nor is one with another end.
                let other = SocketAddr::new(local.ip(), 1);
                assert_eq!(end_here(other, address).await.unwrap(), End::Elsewhere(None), "{address}");
                assert!(!sock_diag::has_connection(address, SocketAddr::new(local.ip(), 0)).unwrap(), "{address}");
            }
        }
    }
}
