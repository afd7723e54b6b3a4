//! Everything a source may deliver.

use std::{fmt, sync::Arc};

use k8s_openapi::api::{
    core::v1::{Namespace, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
};
use kube::Resource;
use serde::{Deserialize, Deserializer};

use crate::{
    AuthorizationPolicy, ClusterEgressPolicy, EgressPolicy, HttpRoute, MeshConfig,
    PeerAuthentication, Telemetry, TrafficPolicy,
};

/// Names an object among all kinds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    pub kind: Kind,
    /// Empty for what has no namespace.
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ObjectKey {
    pub fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        Self {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

/// `EgressPolicy shop/payments`.
impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            kind,
            namespace,
            name,
        } = self;
        match &**namespace {
            "" => write!(f, "{kind} {name}"),
            _ => write!(f, "{kind} {namespace}/{name}"),
        }
    }
}

macro_rules! kinds {
    ($($kind:ident: $type:ty, $scope:literal;)*) => {
        /// One object as it was typed; shared, since sources and model both keep it.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Object {
            $($kind(Arc<$type>),)*
        }

        /// The kinds that are read. Objects of any other kind are none of ours.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Kind {
            $($kind,)*
        }

        impl Kind {
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// As in `kind:`.
            pub fn as_str(self) -> String {
                match self {
                    $(Self::$kind => <$type as Resource>::kind(&()).into_owned(),)*
                }
            }

            /// As in `apiVersion:`.
            pub fn api_version(self) -> String {
                match self {
                    $(Self::$kind => <$type as Resource>::api_version(&()).into_owned(),)*
                }
            }

            /// Whether its objects live in a namespace.
            pub fn namespaced(self) -> bool {
                match self {
                    $(Self::$kind => $scope == "namespaced",)*
                }
            }
        }

        impl Object {
            pub fn kind(&self) -> Kind {
                match self {
                    $(Self::$kind(_) => Kind::$kind,)*
                }
            }

            /// Reads an object of a known kind from any format.
            pub fn deserialize<'de, D: Deserializer<'de>>(
                kind: Kind,
                deserializer: D,
            ) -> Result<Self, D::Error> {
                match kind {
                    $(Kind::$kind => {
                        <$type>::deserialize(deserializer).map(|object| Self::$kind(object.into()))
                    })*
                }
            }

            pub fn metadata(&self) -> &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                match self {
                    $(Self::$kind(object) => Resource::meta(&**object),)*
                }
            }
        }

        $(impl From<$type> for Object {
            fn from(object: $type) -> Self {
                Self::$kind(Arc::new(object))
            }
        })*
    };
}

kinds! {
    Namespace: Namespace, "cluster";
    ServiceAccount: ServiceAccount, "namespaced";
    Service: Service, "namespaced";
    EndpointSlice: EndpointSlice, "namespaced";
    Pod: Pod, "namespaced";
    HttpRoute: HttpRoute, "namespaced";
    MeshConfig: MeshConfig, "cluster";
    TrafficPolicy: TrafficPolicy, "namespaced";
    AuthorizationPolicy: AuthorizationPolicy, "namespaced";
    PeerAuthentication: PeerAuthentication, "namespaced";
    EgressPolicy: EgressPolicy, "namespaced";
    ClusterEgressPolicy: ClusterEgressPolicy, "cluster";
    Telemetry: Telemetry, "namespaced";
}

impl Kind {
    /// The kind that a document names. `None`: not one that is read.
    pub fn parse(api_version: &str, kind: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|known| known.as_str() == kind && known.api_version() == api_version)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.as_str())
    }
}

impl Object {
    /// A namespaced object without a namespace is in `default`, as for `kubectl`.
    pub fn key(&self) -> ObjectKey {
        let (kind, metadata) = (self.kind(), self.metadata());
        let namespace = match (kind.namespaced(), metadata.namespace.as_deref()) {
            (false, _) => "",
            (true, None | Some("")) => "default",
            (true, Some(namespace)) => namespace,
        };
        ObjectKey::new(
            kind,
            namespace,
            metadata.name.as_deref().unwrap_or_default(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_are_found_by_what_a_document_says() {
        for kind in Kind::ALL {
            assert_eq!(
                Kind::parse(&kind.api_version(), &kind.as_str()),
                Some(*kind)
            );
        }
        assert_eq!(Kind::parse("v1", "Pod"), Some(Kind::Pod));
        assert_eq!(
            Kind::parse("gateway.networking.k8s.io/v1", "HTTPRoute"),
            Some(Kind::HttpRoute)
        );
        assert_eq!(Kind::parse("v1", "EgressPolicy"), None);
    }

    #[test]
    fn keys_name_kind_namespace_and_name() {
        let read = |yaml: &str, kind| {
            let value: serde_json::Value = serde_saphyr::from_str(yaml).unwrap();
            Object::deserialize(kind, value).unwrap().key().to_string()
        };
        let pod = "{apiVersion: v1, kind: Pod, metadata: {name: a}}";
        assert_eq!(read(pod, Kind::Pod), "Pod default/a");
        let mesh = "{apiVersion: turnpike.dev/v1alpha1, kind: MeshConfig, \
                    metadata: {name: default, namespace: ignored}, spec: {}}";
        assert_eq!(read(mesh, Kind::MeshConfig), "MeshConfig default");
    }
}
