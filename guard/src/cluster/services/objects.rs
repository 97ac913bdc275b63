//! Owns the step from the API's objects to what is kept of them.
//! Called by `watch` with each object.
//! Must never fill in what is not there: an object that says too little is of no interest.

use k8s_openapi::{
    api::{
        core::v1,
        discovery::v1::{EndpointConditions, EndpointSlice},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};

use crate::cluster::services::view::{Endpoint, Name, Service, Slice, Takes};

/// Where an EndpointSlice says whose it is.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// The protocol that is meant where none is written.
const TCP: &str = "TCP";

/// A Service, if it has an address of its own.
pub(crate) fn service(object: v1::Service) -> Option<(Name, Option<Service>)> {
    let name = name(&object.metadata)?;
    let kept = object.spec.and_then(|spec| {
        let several = spec.cluster_ips.filter(|all| !all.is_empty());
        let addresses = several.unwrap_or_else(|| spec.cluster_ip.into_iter().collect());
        // `None` is a Service without one.
        let addresses: Vec<_> = addresses.iter().filter_map(|address| address.parse().ok()).collect();
        let tcp = spec.ports.unwrap_or_default().into_iter().filter(|port| is_tcp(port.protocol.as_deref()));
        let ports = tcp.filter_map(|port| Some((number(port.port)?, port.name.unwrap_or_default().into())));
        (!addresses.is_empty()).then(|| Service {
            addresses,
            ports: ports.collect(),
            only_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
        })
    });
    Some((name, kept))
}

/// An EndpointSlice, if it is a Service's.
pub(crate) fn slice(object: EndpointSlice) -> Option<(Name, Option<Slice>)> {
    let name = name(&object.metadata)?;
    let labels = object.metadata.labels.unwrap_or_default();
    let service = labels.get(SERVICE_NAME).filter(|service| !service.is_empty()).map(|service| name.beside(service));
    let kept = service.filter(|_| matches!(object.address_type.as_str(), "IPv4" | "IPv6")).map(|service| {
        let tcp = object.ports.unwrap_or_default().into_iter().filter(|port| is_tcp(port.protocol.as_deref()));
        let ports = tcp.filter_map(|port| Some((port.name.unwrap_or_default().into(), number(port.port?)?)));
        let endpoint = |endpoint: k8s_openapi::api::discovery::v1::Endpoint| {
            // More than one would be other ways to the same.
            let address = endpoint.addresses.first()?.parse().ok()?;
            let takes = takes(endpoint.conditions.as_ref());
            Some(Endpoint { address, takes, node: endpoint.node_name.map(Into::into) })
        };
        Slice {
            service,
            ports: ports.collect(),
            endpoints: object.endpoints.into_iter().filter_map(endpoint).collect(),
        }
    });
    Some((name, kept))
}

fn name(metadata: &ObjectMeta) -> Option<Name> {
    Some(Name::new(metadata.namespace.as_deref()?, metadata.name.as_deref()?))
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == TCP)
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// What is not said is as the API's documentation has it: ready, serving, not ending.
fn takes(conditions: Option<&EndpointConditions>) -> Takes {
    let Some(conditions) = conditions else { return Takes::All };
    let ending = conditions.terminating.unwrap_or(false);
    if conditions.ready.unwrap_or(!ending) {
        Takes::All
    } else if ending && conditions.serving.unwrap_or(true) {
        Takes::Last
    } else {
        Takes::None
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read_service(spec: Value) -> Option<Service> {
        let object = json!({"metadata": {"namespace": "default", "name": "hook"}, "spec": spec});
        service(serde_json::from_value(object).unwrap()).unwrap().1
    }

    #[test]
    fn a_service_is_its_addresses_and_its_tcp_ports() {
        let ports =
            json!([{"port": 443, "name": "https"}, {"port": 53, "protocol": "UDP"}, {"port": 80, "protocol": "TCP"}]);
        let read =
            read_service(json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:96::9"], "ports": ports}))
                .unwrap();
        let addresses: Vec<String> = read.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.96.0.9", "fd00:96::9"]);
        assert_eq!(read.ports, [(443, "https".into()), (80, "".into())]);
        assert!(!read.only_local);
        assert!(read_service(json!({"clusterIP": "10.96.0.9", "internalTrafficPolicy": "Local"})).unwrap().only_local);
        for none in [
            json!({"clusterIP": "None", "clusterIPs": ["None"]}),
            json!({"type": "ExternalName", "externalName": "a.example"}),
            json!({}),
        ] {
            assert_eq!(read_service(none.clone()), None, "{none}");
        }
        assert!(service(v1::Service::default()).is_none());
    }

    #[test]
    fn a_slice_is_whose_it_is_where_and_whether() {
        let read = |labels: Value, kind: &str, conditions: Value| {
            let object = json!({
                "metadata": {"namespace": "default", "name": "hook-abc", "labels": labels}, "addressType": kind,
                "ports": [{"name": "https", "port": 8443}, {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "any"}],
                "endpoints": [{"addresses": ["10.244.1.1", "10.244.1.2"], "nodeName": "here", "conditions": conditions}, {"addresses": []}],
            });
            slice(serde_json::from_value(object).unwrap()).unwrap().1
        };
        let ours = json!({"kubernetes.io/service-name": "hook"});
        let good = read(ours.clone(), "IPv4", json!({"ready": true})).unwrap();
        assert_eq!(good.service.to_string(), "default/hook");
        assert_eq!(good.ports, [("https".into(), 8443)]);
        assert_eq!(
            good.endpoints,
            [Endpoint { address: "10.244.1.1".parse().unwrap(), takes: Takes::All, node: Some("here".into()) }]
        );
        // As Go writes an empty list.
        let empty = json!({"metadata": {"namespace": "n", "name": "s", "labels": ours}, "addressType": "IPv6", "endpoints": null, "ports": null});
        assert!(slice(serde_json::from_value(empty).unwrap()).unwrap().1.unwrap().endpoints.is_empty());
        assert_eq!(read(json!({}), "IPv4", json!({})), None);
        assert_eq!(read(ours.clone(), "FQDN", json!({})), None);
        for (conditions, takes) in [
            (json!({}), Takes::All),
            (json!({"ready": false}), Takes::None),
            (json!({"ready": false, "serving": true, "terminating": true}), Takes::Last),
            (json!({"ready": false, "serving": false, "terminating": true}), Takes::None),
            (json!({"ready": true, "serving": true, "terminating": true}), Takes::All),
        ] {
            assert_eq!(
                read(ours.clone(), "IPv4", conditions.clone()).unwrap().endpoints[0].takes,
                takes,
                "{conditions}"
            );
        }
    }
}
