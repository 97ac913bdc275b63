//! Owns how to reach the proxy-servers, and as whom.
//! Called by the command line, which fills it, and by the rest of the tunnel.
//! Must never be changed while the tunnel runs: what changes is in the files that it names.

use std::time::Duration;

use crate::{
    cluster::leases::LeaseConfig,
    net::{
        hosts::{Host, Place},
        tls::{Files, Manner},
    },
    tunnel::{identifiers::Identifiers, servers::Pace},
};

/// How to reach the proxy-servers, and as whom.
#[derive(Clone, Debug)]
pub struct TunnelConfig {
    /// Where they are.
    pub hosts: Vec<Host>,
    /// Trust and identity.
    pub files: Files,
    /// How TLS is done.
    pub manner: Manner,
    /// The id of this agent; each stream adds a part of its own.
    pub agent_id: String,
    /// What the control plane may dial this agent by.
    pub identifiers: Identifiers,
    /// The waits.
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
    /// What the last server that was new said.
    Responses,
    /// Their leases.
    Leases(LeaseConfig),
    /// The larger of the two.
    Larger(LeaseConfig),
}

impl TunnelConfig {
    /// A place in words.
    pub(crate) fn at(&self, place: Place) -> String {
        match place {
            Place::Address(address) => address.to_string(),
            Place::Proxied(number) => {
                let host = self.hosts.get(number);
                let through = host.and_then(|host| Some(format!("{host} through {}", host.through.as_ref()?)));
                through.unwrap_or_default()
            }
        }
    }

    /// The same, with the name of its host.
    pub(crate) fn named(&self, host: Option<&Host>, place: Place) -> String {
        match (host, place) {
            (Some(host), Place::Address(address)) if host.address().is_none() => format!("{host} ({})", address.ip()),
            (Some(_) | None, Place::Address(_) | Place::Proxied(_)) => self.at(place),
        }
    }
}
