//! Owns the hosts that this process connects to: proxy-servers and the API server, with the HTTP proxy on the way, and their addresses.
//! Called by the command line, `cluster` and `tunnel`.
//! Must never return more than `MAX_ADDRESSES` for one name: a name server is not trusted with that.

use std::{fmt, io, net::SocketAddr, sync::Arc};

use crate::net::{host_port::HostPort, http_proxy::HttpProxy};

/// The largest number of addresses of one host that are dialled.
pub(crate) const MAX_ADDRESSES: usize = 32;

/// A host to connect to. Its certificate must be for its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteHost {
    /// Its name and port.
    pub at: HostPort,
    /// The HTTP proxy on the way.
    pub http_proxy: Option<Arc<HttpProxy>>,
}

/// Where a stream connects to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServerAddress {
    /// An address of a host.
    Direct(SocketAddr),
    /// The host with this index. The HTTP proxy resolves its name.
    Proxied(usize),
}

impl fmt::Display for RemoteHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.at.fmt(f)
    }
}

impl RemoteHost {
    /// Resolves the host to its current addresses; `index` is its own among all hosts.
    pub(crate) async fn resolve(&self, index: usize) -> io::Result<Vec<ServerAddress>> {
        if self.http_proxy.is_some() {
            return Ok(vec![ServerAddress::Proxied(index)]);
        }
        let HostPort { name, port } = &self.at;
        if let Some(address) = self.at.address() {
            return Ok(vec![ServerAddress::Direct(SocketAddr::new(address, *port))]);
        }
        let mut all: Vec<ServerAddress> = Vec::new();
        for address in tokio::net::lookup_host((name.as_str(), *port)).await?.map(ServerAddress::Direct) {
            if !all.contains(&address) && all.len() < MAX_ADDRESSES {
                all.push(address);
            }
        }
        if all.is_empty() { Err(io::Error::new(io::ErrorKind::NotFound, "no address")) } else { Ok(all) }
    }
}
