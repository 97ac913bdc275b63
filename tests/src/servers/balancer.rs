//! Owns a TCP balancer: each connection goes to the next backend that answers.
//! Called by tests with several proxy-servers behind one address.
//! Must never look into what passes.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::Result;
use tokio::net::TcpStream;

use super::Listener;

/// A running balancer.
pub struct Balancer {
    backends: Arc<Mutex<Vec<SocketAddr>>>,
    listener: Listener,
}

impl Balancer {
    /// Listens in front of these backends.
    pub async fn start(address: SocketAddr, backends: &[SocketAddr]) -> Result<Balancer> {
        let backends = Arc::new(Mutex::new(backends.to_vec()));
        let (shared, turn) = (Arc::clone(&backends), AtomicUsize::new(0));
        let listener = Listener::start(address, move |mut near| {
            let mut all = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let first = turn.fetch_add(1, Ordering::Relaxed) % all.len().max(1);
            all.rotate_left(first);
            async move {
                for backend in all {
                    if let Ok(mut far) = TcpStream::connect(backend).await {
                        tokio::io::copy_bidirectional(&mut near, &mut far).await?;
                        break;
                    }
                }
                Ok(())
            }
        })
        .await?;
        Ok(Balancer { backends, listener })
    }

    /// From the next connection on, these are the backends.
    pub fn set(&self, backends: &[SocketAddr]) {
        *self.backends.lock().unwrap_or_else(PoisonError::into_inner) = backends.to_vec();
    }

    /// Ends every connection.
    pub fn cut(&self) {
        self.listener.cut();
    }
}
