//! Owns the end of the daemon's work: no new dials, the open ones go on until they are done or a deadline.
//! Called by `parts` on SIGTERM or SIGINT.
//! Must never detach anything from the kernel: enforcement outlives the daemon.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    dial::connections::{CloseReason, Connections},
    tunnel::stream::session::LINGER,
};

/// Drains. `true` where every dial ended by itself; a second signal (`hurry`) ends the wait.
pub async fn drain(
    connections: &Arc<Connections>,
    drain: &CancellationToken,
    deadline: Duration,
    hurry: impl Future<Output = ()>,
) -> bool {
    drain.cancel();
    let open = connections.counts().open;
    tracing::info!(open, ?deadline, "draining: no new dials");
    let idle = async {
        tokio::time::sleep(LINGER).await;
        connections.idle().await;
    };
    tokio::select! {
        () = idle => return true,
        () = tokio::time::sleep(deadline) => {
            tracing::warn!(open = connections.counts().open, "the drain's time is over: the open dials are reset");
        }
        () = hurry => tracing::warn!(open = connections.counts().open, "a second signal: the open dials are reset"),
    }
    connections.end_all(CloseReason::Drained);
    let _ = tokio::time::timeout(Duration::from_secs(1), connections.idle()).await;
    false
}
