//! EndpointSlices.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1::{Endpoint as EndpointObject, EndpointSlice};
use turnpike_rules::service::EndpointState;

use super::service::Service;
use crate::{key::Key, shards::Mapping};

const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Slice {
    pub(crate) key: Key,
    pub(crate) service: Key,
    ports: Vec<(String, u16)>,
    pub(crate) endpoints: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) addresses: Vec<IpAddr>,
    /// Always of the slice's own namespace.
    pub(crate) pod: Option<Key>,
    pub(crate) state: Option<EndpointState>,
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) node: Option<Arc<str>>,
}

impl Slice {
    /// `None` where it belongs to no Service.
    pub(crate) fn read(object: &EndpointSlice) -> Option<Self> {
        let key = Key::of(&object.metadata);
        let service = object.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
        let ports = object.ports.iter().flatten().filter_map(|port| {
            let tcp = port
                .protocol
                .as_deref()
                .is_none_or(|protocol| protocol == "TCP");
            let number = u16::try_from(port.port?)
                .ok()
                .filter(|number| *number > 0 && tcp)?;
            Some((port.name.clone().unwrap_or_default(), number))
        });
        Some(Self {
            service: Key::new(&key.namespace, service),
            ports: ports.collect(),
            endpoints: object
                .endpoints
                .iter()
                .map(|e| Entry::read(e, &key))
                .collect(),
            key,
        })
    }

    /// The Service's ports on these endpoints, matched by name as Kubernetes does.
    pub(crate) fn mapping(&self, service: &Service) -> Mapping {
        let target = |name: &str| {
            self.ports
                .iter()
                .find(|(own, _)| own == name)
                .map(|(_, p)| *p)
        };
        let ports = service.ports.iter();
        ports
            .filter_map(|port| Some((port.number, target(&port.name)?)))
            .collect()
    }
}

impl Entry {
    fn read(object: &EndpointObject, slice: &Key) -> Self {
        let pod = object.target_ref.as_ref().filter(|target| {
            target.kind.as_deref() == Some("Pod")
                && target
                    .namespace
                    .as_deref()
                    .is_none_or(|ns| ns == &*slice.namespace)
        });
        Self {
            addresses: object
                .addresses
                .iter()
                .filter_map(|text| text.parse().ok())
                .collect(),
            pod: pod.and_then(|t| Some(Key::new(&slice.namespace, t.name.as_deref()?))),
            state: state(object),
            zone: object.zone.as_deref().map(Arc::from),
            node: object.node_name.as_deref().map(Arc::from),
        }
    }
}

/// Conditions that are not stated hold, but for `terminating`.
fn state(object: &EndpointObject) -> Option<EndpointState> {
    let conditions = object.conditions.as_ref();
    let is = |value: Option<bool>, unstated: bool| value.unwrap_or(unstated);
    let ready = is(conditions.and_then(|c| c.ready), true);
    let terminating = is(conditions.and_then(|c| c.terminating), false);
    let serving = is(conditions.and_then(|c| c.serving), ready);
    match (terminating, ready, serving) {
        (false, true, _) => Some(EndpointState::Serving),
        (true, _, true) => Some(EndpointState::Terminating),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_as_kubernetes_means_them() {
        for (yaml, expected) in [
            ("{}", Some(EndpointState::Serving)),
            ("{ready: true}", Some(EndpointState::Serving)),
            ("{ready: false}", None),
            (
                "{ready: false, serving: true, terminating: true}",
                Some(EndpointState::Terminating),
            ),
            ("{ready: false, serving: false, terminating: true}", None),
            (
                "{ready: true, terminating: true}",
                Some(EndpointState::Terminating),
            ),
        ] {
            let text = format!("{{addresses: [10.0.0.1], conditions: {yaml}}}");
            let object: EndpointObject = serde_saphyr::from_str(&text).unwrap();
            assert_eq!(state(&object), expected, "{yaml}");
        }
    }

    #[test]
    fn a_pod_of_another_namespace_is_no_target() {
        let text = "{metadata: {name: w, namespace: shop, labels: {kubernetes.io/service-name: web}}, \
                    addressType: IPv4, ports: [{name: '', port: 80}], endpoints: [\
                    {addresses: [10.0.0.1, nonsense], targetRef: {kind: Pod, name: a, namespace: bank}}, \
                    {addresses: [10.0.0.2], targetRef: {kind: Pod, name: b, namespace: shop}}]}";
        let slice = Slice::read(&serde_saphyr::from_str(text).unwrap()).unwrap();
        assert_eq!(slice.endpoints[0].pod, None);
        assert_eq!(slice.endpoints[0].addresses.len(), 1);
        assert_eq!(slice.endpoints[1].pod, Some(Key::new("shop", "b")));
    }
}
