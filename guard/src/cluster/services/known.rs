//! Owns what the guard knows of the cluster's Services, where it is asked to (`--watch-services`): which endpoints are behind a ClusterIP.
//! Called by `dial` for each address before it is judged; `status`, the metrics and readiness say how current it is.
//! Must never admit anything: what it picks is judged as any other address, and what it does not know is refused.
//!
//! Reading order: `view` (what is known, and the choice: judgement) -> `read` (objects of the API to that) -> `watch` (keeps it current).

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use guard_policy::{refusal::Refusal, ruleset::ServiceRange};

use crate::{
    cluster::services::{
        feed::{Feed, ServicesState},
        view::{Behind, Name, View},
    },
    net::http_proxy::ProxyEnvironment,
    sys::lock::lock,
};

/// The Services, or that nobody looks at them.
#[derive(Default)]
pub struct Services {
    known: Option<Known>,
}

/// What is known.
pub(crate) struct Known {
    /// How to reach the API server; as a pod does, without one.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The HTTP proxy on the way there.
    pub(crate) environment: ProxyEnvironment,
    /// The node's names, lower case: its own endpoints are chosen first.
    pub(crate) own: Vec<String>,
    pub(crate) view: Mutex<View>,
    pub(crate) services: Arc<Feed>,
    pub(crate) slices: Arc<Feed>,
    pub(crate) turn: AtomicUsize,
}

/// An address that is to be judged, in the place of the one that was asked for or as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: SocketAddr,
    /// The Service whose endpoint it is.
    pub service: Option<Name>,
}

/// A Service's address that is not dialled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The Service's address.
    pub address: SocketAddr,
    /// Why.
    pub refusal: Refusal,
    /// More of it in words.
    pub more: Option<String>,
}

/// What a host name means here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// Nothing: the resolver is asked.
    Nothing,
    /// A Service with these addresses.
    Service(Vec<IpAddr>),
    /// Most likely a Service, and these were never read.
    Unread(Option<String>),
}

impl Services {
    /// Nobody looks: addresses are judged as they are.
    pub fn unwatched() -> Services {
        Services::default()
    }

    /// They are watched as soon as `watch::follow` runs.
    pub fn watched(kubeconfig: Option<PathBuf>, environment: ProxyEnvironment, own: Vec<String>) -> Services {
        let known = Known {
            kubeconfig,
            environment,
            own,
            view: Mutex::default(),
            services: Arc::default(),
            slices: Arc::default(),
            turn: AtomicUsize::new(0),
        };
        Services { known: Some(known) }
    }

    /// What is known, for [`follow`](crate::cluster::services::watch::follow) to keep current; `None` if nobody watches.
    pub(crate) fn known(&self) -> Option<&Known> {
        self.known.as_ref()
    }

    /// What is judged in the place of an address, one after the other.
    pub fn targets(&self, address: SocketAddr, range: Option<&ServiceRange>) -> Result<Vec<Target>, Denied> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let itself = || Ok(vec![Target { address, service: None }]);
        let denied = |refusal, more| Err(Denied { address, refusal, more });
        let Some(known) = &self.known else { return itself() };
        let declared = range.is_some_and(|range| range.is_declared(address.ip()));
        let view = lock(&known.view);
        if !view.is_read() {
            return if declared { denied(Refusal::ServicesUnread, known.error()) } else { itself() };
        }
        match view.behind(address, &known.own, known.turn.fetch_add(1, Ordering::Relaxed)) {
            Behind::NoService if declared => denied(Refusal::ServiceUnknown, None),
            Behind::NoService => itself(),
            Behind::NoPort(name) => {
                denied(Refusal::ServiceUnknown, Some(format!("{name} has no TCP port {}", address.port())))
            }
            Behind::NoEndpoint(name) => denied(Refusal::ServiceNotReady, Some(name.to_string())),
            Behind::Endpoints(name, all) => {
                Ok(all.into_iter().map(|address| Target { address, service: Some(name.clone()) }).collect())
            }
        }
    }

    /// What a refusal of a target is told as: that of an endpoint names it, and where Services are watched nobody is told to watch them.
    pub fn told(&self, refusal: Refusal, target: &Target) -> (Refusal, Option<String>) {
        match (&self.known, &target.service) {
            (_, Some(service)) => (refusal, Some(format!("endpoint {} of Service {service}", target.address))),
            (Some(known), None) if refusal == Refusal::ServiceAddress => {
                if lock(&known.view).is_read() {
                    (Refusal::ServiceUnknown, None)
                } else {
                    (Refusal::ServicesUnread, known.error())
                }
            }
            (Some(_) | None, None) => (refusal, None),
        }
    }

    /// What a host name means.
    pub fn named(&self, host: &str) -> Named {
        let (Some(known), Some(name)) = (&self.known, Name::of_host(host)) else { return Named::Nothing };
        let view = lock(&known.view);
        match view.addresses(&name) {
            _ if !view.is_read() => Named::Unread(known.error()),
            Some(addresses) => Named::Service(addresses),
            None => Named::Nothing,
        }
    }

    /// Why a host name that the resolver does not know is refused, if it has the shape of a Service's.
    pub fn unresolved(&self, host: &str) -> Option<(Refusal, String)> {
        Name::of_host(host)?;
        Some(match &self.known {
            None => (Refusal::ServiceAddress, "by a name that this node's resolver does not know".to_owned()),
            Some(_) => (Refusal::ServiceUnknown, "nor this name".to_owned()),
        })
    }

    /// The check of readiness, where they are watched.
    pub fn readiness(&self) -> Option<(&'static str, bool, String)> {
        let (holds, words) = self.state()?.readiness();
        Some(("services-read", holds, words))
    }

    /// How current it is; nothing where nobody looks.
    pub fn state(&self) -> Option<ServicesState> {
        self.known.as_ref().map(|known| {
            let view = lock(&known.view);
            let (services, endpoints) = view.counts();
            ServicesState {
                read: view.is_read(),
                services,
                endpoints,
                age_seconds: known.services.age().zip(known.slices.age()).map(|(one, other)| one.max(other).as_secs()),
                errors: known.services.errors() + known.slices.errors(),
                last_error: known.error(),
            }
        })
    }
}

impl Known {
    /// Why it is not current.
    fn error(&self) -> Option<String> {
        self.services.error().or_else(|| self.slices.error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::services::view::tests::{endpoint, service, slice};

    fn to(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn target(text: &str, service: Option<&str>) -> Target {
        let service = service.map(|text| {
            let (namespace, name) = text.split_once('/').unwrap();
            Name::new(namespace, name)
        });
        Target { address: to(text), service }
    }

    #[test]
    fn what_was_never_read_is_refused_and_never_judged_as_it_is() {
        let range = ServiceRange { declared: vec!["10.96.0.0/16".parse().unwrap()], guessed: None };
        let services = Services::watched(None, ProxyEnvironment::default(), vec!["here".into()]);
        let denied = services.targets(to("10.96.0.9:443"), Some(&range)).unwrap_err();
        assert_eq!(denied.refusal, Refusal::ServicesUnread);
        assert_eq!(services.named("hook.default.svc"), Named::Unread(None));
        assert_eq!(services.named("node-1"), Named::Nothing);
        // Elsewhere the policy has the word, and what it says of a Service is told in the words of one who looks.
        assert_eq!(services.targets(to("10.0.0.1:80"), Some(&range)).unwrap(), [target("10.0.0.1:80", None)]);
        let told = services.told(Refusal::ServiceAddress, &target("10.97.0.9:443", None));
        assert_eq!(told.0, Refusal::ServicesUnread);
        assert!(!services.state().unwrap().read);
    }

    #[test]
    fn a_cluster_ip_is_its_endpoints_and_nothing_else() {
        let services = Services::watched(None, ProxyEnvironment::default(), vec!["here".into()]);
        {
            let mut view = lock(&services.known.as_ref().unwrap().view);
            view.read_all(
                vec![
                    service("default/hook", &["10.96.0.9"], &[(443, "https")]),
                    service("default/empty", &["10.96.0.8"], &[(443, "")]),
                ],
                vec![slice(
                    "default/hook",
                    &[("https", 8443)],
                    vec![endpoint("10.244.2.1", Some("there")), endpoint("10.244.1.1", Some("here"))],
                )],
            );
        }
        let range = ServiceRange { declared: vec!["10.96.0.0/16".parse().unwrap()], guessed: None };
        let behind = |text: &str| services.targets(to(text), Some(&range));
        let hook = Some("default/hook");
        let want = [target("10.244.1.1:8443", hook), target("10.244.2.1:8443", hook)];
        assert_eq!(behind("10.96.0.9:443").unwrap(), want);
        assert_eq!(behind("[::ffff:10.96.0.9]:443").unwrap(), want);
        for (address, refusal, word) in [
            ("10.96.0.9:80", Refusal::ServiceUnknown, Some("default/hook has no TCP port 80")),
            ("10.96.0.7:443", Refusal::ServiceUnknown, None),
            ("10.96.0.8:443", Refusal::ServiceNotReady, Some("default/empty")),
        ] {
            let denied = behind(address).unwrap_err();
            assert_eq!((denied.refusal, denied.more.as_deref()), (refusal, word), "{address}");
        }
        assert_eq!(
            services.named("Hook.default.svc.cluster.local."),
            Named::Service(vec!["10.96.0.9".parse().unwrap()])
        );
        assert_eq!(services.named("other.default.svc"), Named::Nothing);
        let (refusal, more) = services.told(Refusal::AddressNotNamed, &want[0]);
        assert_eq!(
            (refusal, more.as_deref()),
            (Refusal::AddressNotNamed, Some("endpoint 10.244.1.1:8443 of Service default/hook"))
        );
        assert_eq!(services.told(Refusal::ServiceAddress, &target("10.97.0.9:443", None)).0, Refusal::ServiceUnknown);
        let state = services.state().unwrap();
        assert_eq!((state.read, state.services, state.endpoints), (true, 2, 2));
    }

    #[test]
    fn where_nobody_looks_every_address_is_judged_as_it_is() {
        let services = Services::unwatched();
        let range = ServiceRange { declared: vec!["10.96.0.0/16".parse().unwrap()], guessed: None };
        assert_eq!(services.targets(to("10.96.0.9:443"), Some(&range)).unwrap(), [target("10.96.0.9:443", None)]);
        assert_eq!(services.named("hook.default.svc"), Named::Nothing);
        assert_eq!(services.unresolved("hook.default.svc").unwrap().0, Refusal::ServiceAddress);
        assert_eq!(services.unresolved("node-1"), None);
        assert!(services.state().is_none());
    }
}
