//! Owns how to reach the proxy-servers, and as whom.
//! Called by the command line, which fills it, and by the rest of the tunnel.
//! Must never be changed while the tunnel runs: what changes is in the files that it names.

use std::time::Duration;

use crate::{
    cluster::leases::LeaseConfig,
    net::{
        remote_host::{RemoteHost, ServerAddress},
        tls::{CredentialFiles, TlsOptions},
    },
    tunnel::{identifiers::Identifiers, servers::Pace},
};

/// How to reach the proxy-servers, and as whom.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// Where they are.
    pub hosts: Vec<RemoteHost>,
    /// Trust and identity.
    pub files: CredentialFiles,
    /// How TLS is done.
    pub tls: TlsOptions,
    /// The id of this agent; each stream adds a part of its own.
    pub agent_id: String,
    /// What the control plane may dial this agent by.
    pub identifiers: Identifiers,
    /// The waits between connection attempts.
    pub pace: Pace,
    /// How often an idle stream is probed.
    pub keepalive: Duration,
    /// How old a stream may become before another takes its place.
    pub max_age: Option<Duration>,
    /// Where the number of servers comes from.
    pub count: CountSource,
}

/// Where the number of servers comes from.
#[derive(Clone, Debug)]
pub enum CountSource {
    /// The count that the last new server advertised.
    Responses,
    /// The leases of the servers.
    Leases(LeaseConfig),
    /// The larger of the two.
    Larger(LeaseConfig),
}

impl TunnelConfig {
    /// The text for an address.
    pub(crate) fn at(&self, address: ServerAddress) -> String {
        match address {
            ServerAddress::Direct(address) => address.to_string(),
            ServerAddress::Proxied(number) => {
                let host = self.hosts.get(number);
                let proxied = host.and_then(|host| Some(format!("{host} through {}", host.http_proxy.as_ref()?)));
                proxied.unwrap_or_default()
            }
        }
    }

    /// The text for an address, with the name of its host.
    pub(crate) fn named(&self, host: Option<&RemoteHost>, address: ServerAddress) -> String {
        match (host, address) {
            (Some(host), ServerAddress::Direct(address)) if host.at.address().is_none() => {
                format!("{host} ({})", address.ip())
            }
            (Some(_) | None, ServerAddress::Direct(_) | ServerAddress::Proxied(_)) => self.at(address),
        }
    }
}
