//! Owns what is known of Services and their endpoints, and the choice among these: judgement, without IO.
//! Called by `services` for each dial, by `watch` with each change.
//! Must never choose an endpoint that does not take connections while one does, nor show a list that is half read.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, mem,
    net::{IpAddr, SocketAddr},
};

/// How many endpoints of a Service are tried for a dial.
const TRIES: usize = 8;

/// Namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    namespace: Box<str>,
    name: Box<str>,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Name {
    /// Of these.
    pub fn new(namespace: &str, name: &str) -> Name {
        Name { namespace: namespace.into(), name: name.into() }
    }

    /// Of a host name as API servers write a Service's: `name.namespace.svc`, with or without the usual cluster domain.
    pub fn of_host(host: &str) -> Option<Name> {
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        match host.split('.').collect::<Vec<_>>()[..] {
            [name, namespace, "svc"] | [name, namespace, "svc", "cluster", "local"]
                if !name.is_empty() && !namespace.is_empty() =>
            {
                Some(Name::new(namespace, name))
            }
            _ => None,
        }
    }

    /// Another name in the same namespace.
    pub(crate) fn beside(&self, name: &str) -> Name {
        Name { namespace: self.namespace.clone(), name: name.into() }
    }
}

/// A Service that has an address of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Service {
    /// Its ClusterIPs.
    pub(crate) addresses: Vec<IpAddr>,
    /// Its TCP ports, with their names.
    pub(crate) ports: Vec<(u16, Box<str>)>,
    /// Only endpoints of the caller's node are meant (`internalTrafficPolicy: Local`).
    pub(crate) only_local: bool,
}

/// A part of a Service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slice {
    /// The Service.
    pub(crate) service: Name,
    /// TCP ports of the endpoints, by name.
    pub(crate) ports: Vec<(Box<str>, u16)>,
    /// The endpoints.
    pub(crate) endpoints: Vec<Endpoint>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Where.
    pub(crate) address: IpAddr,
    /// Whether it takes connections.
    pub(crate) takes: Takes,
    /// The node that it is on.
    pub(crate) node: Option<Box<str>>,
}

/// Whether an endpoint takes connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Takes {
    /// It is ready.
    All,
    /// It is ending and still serves: better than nothing, as for kube-proxy.
    Last,
    /// It does not.
    None,
}

/// A change that the API server tells.
#[derive(Clone, Debug)]
pub(crate) enum Change<T> {
    /// A whole list follows.
    Begin,
    /// An entry of it.
    Listed(Name, Option<T>),
    /// The list is whole.
    Done,
    /// One is so now; nothing: it is of no interest any more.
    Set(Name, Option<T>),
}

/// What an address stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// Itself.
    NoService,
    /// A Service without such a port.
    NoPort(Name),
    /// A Service without an endpoint that takes connections.
    NoEndpoint(Name),
    /// These, in the order in which they are tried.
    Endpoints(Name, Vec<SocketAddr>),
}

/// Everything of one kind.
#[derive(Debug)]
struct WatchedObjects<T> {
    whole: HashMap<Name, T>,
    /// A list that is being read: it takes the place of the old one when it is whole.
    coming: HashMap<Name, T>,
    read: bool,
}

impl<T> Default for WatchedObjects<T> {
    fn default() -> WatchedObjects<T> {
        WatchedObjects { whole: HashMap::new(), coming: HashMap::new(), read: false }
    }
}

impl<T> WatchedObjects<T> {
    /// Whether the whole list is another one now. The entry that was changed, otherwise.
    fn take(&mut self, change: Change<T>) -> Option<Changed<T>> {
        match change {
            Change::Begin => self.coming = HashMap::new(),
            Change::Listed(name, Some(entry)) => drop(self.coming.insert(name, entry)),
            Change::Listed(_, None) => {}
            Change::Done => {
                self.whole = mem::take(&mut self.coming);
                self.read = true;
                return Some(Changed::All);
            }
            Change::Set(name, entry) => {
                let before = match entry {
                    Some(entry) => self.whole.insert(name.clone(), entry),
                    None => self.whole.remove(&name),
                };
                return Some(Changed::One(name, before));
            }
        }
        None
    }
}

enum Changed<T> {
    All,
    One(Name, Option<T>),
}

/// What is known.
#[derive(Debug, Default)]
pub struct View {
    services: WatchedObjects<Service>,
    slices: WatchedObjects<Slice>,
    /// Whose an address is.
    owners: HashMap<IpAddr, Name>,
    /// The slices of a Service.
    parts: HashMap<Name, BTreeSet<Name>>,
}

impl View {
    /// Whether both lists were read as a whole.
    pub(crate) fn is_read(&self) -> bool {
        self.services.read && self.slices.read
    }

    /// How many Services and endpoints.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.services.whole.len(), self.slices.whole.values().map(|slice| slice.endpoints.len()).sum())
    }

    /// The addresses of a Service.
    pub(crate) fn addresses(&self, name: &Name) -> Option<Vec<IpAddr>> {
        self.services.whole.get(name).map(|service| service.addresses.clone())
    }

    /// A Service, or a list of them, is another one.
    pub(crate) fn service(&mut self, change: Change<Service>) {
        match self.services.take(change) {
            None => {}
            Some(Changed::All) => {
                let owned = |(name, service): (&Name, &Service)| {
                    let name = name.clone();
                    service.addresses.clone().into_iter().map(move |address| (address, name.clone()))
                };
                self.owners = self.services.whole.iter().flat_map(owned).collect();
            }
            Some(Changed::One(name, before)) => {
                // An address that another Service has taken meanwhile stays that one's.
                for address in before.into_iter().flat_map(|service| service.addresses) {
                    if self.owners.get(&address) == Some(&name) {
                        self.owners.remove(&address);
                    }
                }
                if let Some(service) = self.services.whole.get(&name) {
                    self.owners.extend(service.addresses.iter().map(|address| (*address, name.clone())));
                }
            }
        }
    }

    /// An EndpointSlice, or a list of them, is another one.
    pub(crate) fn slice(&mut self, change: Change<Slice>) {
        match self.slices.take(change) {
            None => {}
            Some(Changed::All) => {
                self.parts.clear();
                for (name, slice) in &self.slices.whole {
                    self.parts.entry(slice.service.clone()).or_default().insert(name.clone());
                }
            }
            Some(Changed::One(name, before)) => {
                if let Some(before) = before
                    && let Some(parts) = self.parts.get_mut(&before.service)
                {
                    parts.remove(&name);
                    if parts.is_empty() {
                        self.parts.remove(&before.service);
                    }
                }
                if let Some(slice) = self.slices.whole.get(&name) {
                    self.parts.entry(slice.service.clone()).or_default().insert(name);
                }
            }
        }
    }

    /// What an address stands for, to a node of these names (lower case). `turn` spreads dials over endpoints.
    pub(crate) fn behind(&self, to: SocketAddr, own: &[String], turn: usize) -> Behind {
        let Some((name, service)) =
            self.owners.get(&to.ip()).and_then(|name| Some((name, self.services.whole.get(name)?)))
        else {
            return Behind::NoService;
        };
        let Some((_, port)) = service.ports.iter().find(|(number, _)| *number == to.port()) else {
            return Behind::NoPort(name.clone());
        };
        let parts = self.parts.get(name).into_iter().flatten().filter_map(|part| self.slices.whole.get(part));
        let all = pick(service, port, to.is_ipv4(), parts, own, turn);
        if all.is_empty() { Behind::NoEndpoint(name.clone()) } else { Behind::Endpoints(name.clone(), all) }
    }
}

/// The endpoints to try for a port of a Service: those that are ready, this node's before others'; only where none is, those that are ending.
fn pick<'a>(
    service: &Service,
    port: &str,
    v4: bool,
    slices: impl Iterator<Item = &'a Slice>,
    own: &[String],
    turn: usize,
) -> Vec<SocketAddr> {
    // By how it takes connections and whose it is.
    let mut tiers: BTreeMap<(bool, bool), BTreeSet<SocketAddr>> = BTreeMap::new();
    for slice in slices {
        let Some((_, number)) = slice.ports.iter().find(|(name, _)| **name == *port) else { continue };
        for Endpoint { address, takes, node } in &slice.endpoints {
            let here = node.as_ref().is_some_and(|node| own.contains(&node.to_lowercase()));
            let last = match takes {
                Takes::All => false,
                Takes::Last => true,
                Takes::None => continue,
            };
            if address.is_ipv4() == v4 && (here || !service.only_local) {
                tiers.entry((last, !here)).or_default().insert(SocketAddr::new(*address, *number));
            }
        }
    }
    let any_ready = tiers.keys().any(|(last, _)| !last);
    let tiers = tiers.into_iter().filter(|((last, _), _)| !(any_ready && *last));
    let in_turn = tiers.flat_map(|(_, tier)| {
        let mut tier: Vec<SocketAddr> = tier.into_iter().collect();
        let first = turn % tier.len().max(1);
        tier.rotate_left(first);
        tier
    });
    in_turn.take(TRIES).collect()
}

#[cfg(test)]
#[path = "view_tests.rs"]
pub(crate) mod tests;
