//! Owns the tests of `view`: which endpoint is chosen, and that lists and changes come to the same.

use proptest::prelude::*;

use super::*;

fn name(text: &str) -> Name {
    let (namespace, name) = text.split_once('/').unwrap();
    Name::new(namespace, name)
}

/// A Service.
pub(in crate::cluster::services) fn service(name: &str, addresses: &[&str], ports: &[(u16, &str)]) -> (Name, Service) {
    let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
    let ports = ports.iter().map(|(number, name)| (*number, (*name).into())).collect();
    (self::name(name), Service { addresses, ports, only_local: false })
}

/// A slice of a Service, named after it.
pub(in crate::cluster::services) fn slice(of: &str, ports: &[(&str, u16)], endpoints: Vec<Endpoint>) -> (Name, Slice) {
    let ports = ports.iter().map(|(name, number)| ((*name).into(), *number)).collect();
    (name(&format!("{of}-1")), Slice { service: name(of), ports, endpoints })
}

/// One that is ready.
pub(in crate::cluster::services) fn endpoint(address: &str, node: Option<&str>) -> Endpoint {
    Endpoint { address: address.parse().unwrap(), takes: Takes::All, node: node.map(Into::into) }
}

impl View {
    /// Both lists as a whole.
    pub(in crate::cluster::services) fn read_all(
        &mut self,
        services: Vec<(Name, Service)>,
        slices: Vec<(Name, Slice)>,
    ) {
        self.service(Change::Begin);
        services.into_iter().for_each(|(name, service)| self.service(Change::Listed(name, Some(service))));
        self.service(Change::Done);
        self.slice(Change::Begin);
        slices.into_iter().for_each(|(name, slice)| self.slice(Change::Listed(name, Some(slice))));
        self.slice(Change::Done);
    }
}

fn behind(view: &View, to: &str, turn: usize) -> Vec<String> {
    match view.behind(to.parse().unwrap(), &["here".to_owned()], turn) {
        Behind::Endpoints(_, all) => all.iter().map(SocketAddr::to_string).collect(),
        Behind::NoService => vec!["NoService".to_owned()],
        Behind::NoPort(_) => vec!["NoPort".to_owned()],
        Behind::NoEndpoint(_) => vec!["NoEndpoint".to_owned()],
    }
}

#[test]
fn a_service_name_is_told_from_others() {
    for host in
        ["hook.default.svc", "Hook.Default.SVC.", "hook.default.svc.cluster.local", "hook.default.svc.cluster.local."]
    {
        assert_eq!(Name::of_host(host), Some(name("default/hook")), "{host}");
    }
    for host in [
        "",
        "svc",
        "default.svc",
        ".default.svc",
        "hook..svc",
        "a.hook.default.svc",
        "hook.default.svc.example",
        "hook.default.pod",
        "node-1",
    ] {
        assert_eq!(Name::of_host(host), None, "{host}");
    }
}

#[test]
fn the_nodes_own_ready_endpoint_comes_first() {
    let mut view = View::default();
    let ending = Endpoint { takes: Takes::Last, ..endpoint("10.244.1.7", Some("here")) };
    let unready = Endpoint { takes: Takes::None, ..endpoint("10.244.1.8", Some("here")) };
    let mut all = vec![
        endpoint("10.244.2.1", Some("there")),
        endpoint("10.244.2.2", None),
        endpoint("10.244.1.1", Some("HERE")),
        endpoint("fd00:244::1", Some("here")),
        ending.clone(),
        unready.clone(),
    ];
    let hook = service("default/hook", &["10.96.0.9", "fd00:96::9"], &[(443, "https"), (9090, "metrics")]);
    let ports = [("https", 8443), ("metrics", 9091)];
    view.read_all(vec![hook.clone()], vec![slice("default/hook", &ports, all.clone())]);
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["10.244.1.1:8443", "10.244.2.1:8443", "10.244.2.2:8443"]);
    assert_eq!(behind(&view, "10.96.0.9:443", 1), ["10.244.1.1:8443", "10.244.2.2:8443", "10.244.2.1:8443"]);
    assert_eq!(behind(&view, "10.96.0.9:9090", 0)[0], "10.244.1.1:9091");
    assert_eq!(behind(&view, "[fd00:96::9]:443", 0), ["[fd00:244::1]:8443"]);
    assert_eq!(behind(&view, "10.96.0.9:8443", 0), ["NoPort"]);
    assert_eq!(behind(&view, "10.96.0.10:443", 0), ["NoService"]);
    // With `internalTrafficPolicy: Local` nobody else's will do.
    let local = Service { only_local: true, ..hook.1.clone() };
    view.service(Change::Set(hook.0.clone(), Some(local)));
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["10.244.1.1:8443"]);
    // An endpoint that is ending is better than none, and one that is not ready is none.
    all.truncate(0);
    all.extend([ending, unready.clone()]);
    let (part, slice) = slice("default/hook", &ports, all);
    view.slice(Change::Set(part.clone(), Some(slice.clone())));
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["10.244.1.7:8443"]);
    view.slice(Change::Set(part.clone(), Some(Slice { endpoints: vec![unready], ..slice })));
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["NoEndpoint"]);
    view.slice(Change::Set(part, None));
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["NoEndpoint"]);
    view.service(Change::Set(hook.0, None));
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["NoService"]);
}

#[test]
fn a_list_takes_the_place_of_the_old_one_when_it_is_whole() {
    let mut view = View::default();
    let hook = || service("default/hook", &["10.96.0.9"], &[(443, "")]);
    view.service(Change::Begin);
    let (name, entry) = hook();
    view.service(Change::Listed(name, Some(entry)));
    assert!(!view.is_read() && behind(&view, "10.96.0.9:443", 0) == ["NoService"]);
    view.read_all(vec![hook()], vec![slice("default/hook", &[("", 8443)], vec![endpoint("10.244.1.1", None)])]);
    assert!(view.is_read());
    // The API server starts over: what was known stays until the new list is there.
    view.service(Change::Begin);
    view.slice(Change::Begin);
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["10.244.1.1:8443"]);
    view.service(Change::Done);
    assert_eq!(behind(&view, "10.96.0.9:443", 0), ["NoService"]);
    view.slice(Change::Done);
    assert_eq!(view.counts(), (0, 0));
}

#[test]
fn an_address_that_changes_hands_is_its_new_owners() {
    let mut view = View::default();
    let (old, entry) = service("a/old", &["10.96.0.9"], &[(1, "")]);
    view.read_all(vec![(old.clone(), entry)], Vec::new());
    let (new, entry) = service("a/new", &["10.96.0.9"], &[(2, "")]);
    view.service(Change::Set(new, Some(entry)));
    view.service(Change::Set(old, None));
    assert_eq!(behind(&view, "10.96.0.9:2", 0), ["NoEndpoint"]);
}

/// A change of one of few entries, so that they meet.
fn change() -> impl Strategy<Value = (bool, u8, Option<(u8, u8, bool)>)> {
    (any::<bool>(), 0u8..4, prop::option::of((0u8..4, 0u8..3, any::<bool>())))
}

proptest! {
    #[test]
    fn a_list_says_what_the_changes_before_it_said(changes in prop::collection::vec(change(), 0..40), turn in any::<usize>()) {
        let mut changed = View::default();
        changed.read_all(Vec::new(), Vec::new());
        let (mut services, mut slices) = (HashMap::new(), HashMap::new());
        for (of_slice, number, entry) in changes {
            // One owner an address at most, as the API server sees to.
            let name = name(&format!("n/{number}"));
            if of_slice {
                let entry = entry.map(|(of, port, ready)| Slice {
                    service: name.beside(&of.to_string()),
                    ports: vec![(port.to_string().into(), 80 + u16::from(port))],
                    endpoints: vec![Endpoint {
                        address: [10, 244, 0, number].into(),
                        takes: if ready { Takes::All } else { Takes::Last },
                        node: (port > 0).then(|| "here".into()),
                    }],
                });
                changed.slice(Change::Set(name.clone(), entry.clone()));
                slices.insert(name, entry);
            } else {
                let entry = entry.map(|(_, port, only_local)| Service {
                    addresses: vec![[10, 96, 0, number].into()],
                    ports: vec![(u16::from(port), port.to_string().into())],
                    only_local,
                });
                changed.service(Change::Set(name.clone(), entry.clone()));
                services.insert(name, entry);
            }
        }
        let mut listed = View::default();
        let there = |(name, entry): (Name, Option<Service>)| Some((name, entry?));
        let parts = |(name, entry): (Name, Option<Slice>)| Some((name, entry?));
        listed.read_all(services.into_iter().filter_map(there).collect(), slices.into_iter().filter_map(parts).collect());
        prop_assert_eq!(changed.counts(), listed.counts());
        for number in 0..4u8 {
            for port in 0..3u16 {
                let to = SocketAddr::from(([10, 96, 0, number], port));
                let own = ["here".to_owned()];
                let behind = changed.behind(to, &own, turn);
                prop_assert_eq!(&behind, &listed.behind(to, &own, turn));
                if let Behind::Endpoints(service, all) = behind {
                    // Each is an endpoint of that Service at that port.
                    prop_assert!(!all.is_empty() && all.len() <= TRIES);
                    for address in all {
                        let named = |slice: &Slice| {
                            slice.service == service
                                && slice.ports.iter().any(|(name, at)| **name == *port.to_string() && *at == address.port())
                                && slice.endpoints.iter().any(|endpoint| endpoint.address == address.ip())
                        };
                        prop_assert!(changed.slices.whole.values().any(named));
                    }
                }
            }
        }
    }
}
