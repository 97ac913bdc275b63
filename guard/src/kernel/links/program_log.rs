//! Owns what the kernel programs say of themselves, in a daemon that was built to show it (feature `ebpf-log`).
//! Called by `load`.
//! Must never be needed: denials are told by events, in every build.

use std::os::fd::AsRawFd;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;

/// Hands the programs' records to the log, at their own level.
pub(crate) fn start(mut ebpf: Ebpf) -> Ebpf {
    let logger = match EbpfLogger::init(&mut ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::error!(%error, "no diagnostics of the kernel programs");
            return ebpf;
        }
    };
    tokio::spawn(async move {
        tracing::info!(descriptor = logger.as_raw_fd(), "diagnostics of the kernel programs are on");
        // SAFETY: the logger owns its descriptor, and nothing replaces or closes it while it is registered.
        let mut logger = match unsafe { AsyncFd::register(logger) } {
            Ok(logger) => logger,
            Err(error) => return tracing::error!(%error, "no diagnostics of the kernel programs"),
        };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    ebpf
}
