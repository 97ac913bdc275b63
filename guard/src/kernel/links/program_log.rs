//! Owns the log output of the kernel programs, in a daemon that is built with the feature `ebpf-log`.
//! Called by `programs`.
//! Must never be necessary: every build reports denials by events.

use std::os::fd::AsRawFd;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::unix::AsyncFd;

/// Forwards the programs' log records to the log, with their level.
pub(crate) fn start(mut ebpf: Ebpf) -> Ebpf {
    let logger = match EbpfLogger::init(&mut ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::error!(%error, "cannot read the log of the kernel programs");
            return ebpf;
        }
    };
    tokio::spawn(async move {
        tracing::info!(descriptor = logger.as_raw_fd(), "the log of the kernel programs is on");
        // SAFETY: the logger owns its descriptor, and nothing replaces or closes it while it is registered.
        let mut logger = match unsafe { AsyncFd::register(logger) } {
            Ok(logger) => logger,
            Err(error) => return tracing::error!(%error, "cannot read the log of the kernel programs"),
        };
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    ebpf
}
