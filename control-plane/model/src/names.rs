//! How resources are named.

use std::net::IpAddr;

use turnpike_rules::ServiceKey;

use crate::{Model, key::Key};

/// Members that the mesh's configuration lists, in the place of a node's name.
pub(crate) const STATIC: &str = "static";

/// The API server's Service. Its endpoints are no pods, and pods with an egress policy may reach it
/// by them all the same: it has an authorization of its own.
pub(crate) fn api_server() -> Key {
    Key::new("default", "kubernetes")
}

impl Model {
    pub(crate) fn service_key(&self, key: &Key) -> ServiceKey {
        ServiceKey {
            cluster: self.settings.cluster.clone(),
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        }
    }

    pub(crate) fn service_name(&self, key: &Key) -> String {
        format!("{}/{key}", self.settings.cluster)
    }

    pub(crate) fn consumer_name(&self, key: &Key, consumer: &str) -> String {
        format!("{}/{key}@{consumer}", self.settings.cluster)
    }

    pub(crate) fn shard_name(&self, key: &Key, suffix: &str) -> String {
        format!("{}/{key}/{suffix}", self.settings.cluster)
    }

    pub(crate) fn pod_name(&self, key: &Key) -> String {
        format!("{}/{key}", self.settings.cluster)
    }

    pub(crate) fn address_name(&self, address: &IpAddr) -> String {
        format!("{}/{}", self.settings.network, address.to_canonical())
    }

    pub(crate) fn members_name(&self, node: &str) -> String {
        format!("{}/{node}", self.settings.cluster)
    }

    /// The part of a name after this cluster's own.
    pub(crate) fn in_cluster<'a>(&self, name: &'a str) -> Option<&'a str> {
        name.strip_prefix(&*self.settings.cluster)?
            .strip_prefix('/')
    }

    /// `cluster/namespace/name`.
    pub(crate) fn read_name(&self, name: &str) -> Option<Key> {
        let (namespace, name) = self.in_cluster(name)?.split_once('/')?;
        (!name.contains('/')).then(|| Key::new(namespace, name))
    }
}
