//! Everything a source may deliver.

use std::{fmt, sync::Arc};

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Pod, Service, ServiceAccount},
        discovery::v1::EndpointSlice,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Resource, core::ApiResource};
use schemars::Schema;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

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
    ($($kind:ident = $name:literal: $type:ty, $scope:literal;)*) => {
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
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
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

        impl Kind {
            #[cfg(test)]
            fn resource_kind(self) -> String {
                match self {
                    $(Self::$kind => <$type as Resource>::kind(&()).into_owned(),)*
                }
            }

            /// How the API serves it.
            pub fn resource(self) -> ApiResource {
                match self {
                    $(Self::$kind => ApiResource::erase::<$type>(&()),)*
                }
            }

            fn schema(self) -> Schema {
                match self {
                    $(Self::$kind => schemars::schema_for!($type),)*
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

            pub fn metadata(&self) -> &ObjectMeta {
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
    Namespace = "Namespace": Namespace, "cluster";
    ServiceAccount = "ServiceAccount": ServiceAccount, "namespaced";
    Service = "Service": Service, "namespaced";
    EndpointSlice = "EndpointSlice": EndpointSlice, "namespaced";
    Pod = "Pod": Pod, "namespaced";
    HttpRoute = "HTTPRoute": HttpRoute, "namespaced";
    MeshConfig = "MeshConfig": MeshConfig, "cluster";
    TrafficPolicy = "TrafficPolicy": TrafficPolicy, "namespaced";
    AuthorizationPolicy = "AuthorizationPolicy": AuthorizationPolicy, "namespaced";
    PeerAuthentication = "PeerAuthentication": PeerAuthentication, "namespaced";
    EgressPolicy = "EgressPolicy": EgressPolicy, "namespaced";
    ClusterEgressPolicy = "ClusterEgressPolicy": ClusterEgressPolicy, "cluster";
    Telemetry = "Telemetry": Telemetry, "namespaced";
}

impl Kind {
    /// The kind that a document names. `None`: not one that is read.
    pub fn parse(api_version: &str, kind: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|known| known.as_str() == kind && known.api_version() == api_version)
    }

    /// Whether Kubernetes itself defines it, not a CRD.
    pub fn is_kubernetes(self) -> bool {
        match self {
            Self::Namespace
            | Self::ServiceAccount
            | Self::Service
            | Self::EndpointSlice
            | Self::Pod => true,
            Self::HttpRoute
            | Self::MeshConfig
            | Self::TrafficPolicy
            | Self::AuthorizationPolicy
            | Self::PeerAuthentication
            | Self::EgressPolicy
            | Self::ClusterEgressPolicy
            | Self::Telemetry => false,
        }
    }
}

/// A step from a value into one of its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Field(&'a str),
    Item,
}

impl Kind {
    /// The fields that its objects may have at a place: what to name where one is unknown. `None`:
    /// the place does not exist, or takes any name.
    pub fn fields(self, path: &[Part<'_>]) -> Option<Vec<String>> {
        // Their schema does not have what every object has.
        const COMMON: [&str; 3] = ["apiVersion", "kind", "metadata"];
        let root = self.schema().to_value();
        if let [Part::Field("metadata"), rest @ ..] = path {
            let metadata = schemars::schema_for!(ObjectMeta).to_value();
            return fields_at(&metadata, &metadata, rest);
        }
        let mut fields = fields_at(&root, &root, path)?;
        if path.is_empty() {
            fields.extend(COMMON.map(str::to_owned));
            fields.sort_unstable();
            fields.dedup();
        }
        Some(fields)
    }
}

fn fields_at(root: &Value, schema: &Value, path: &[Part<'_>]) -> Option<Vec<String>> {
    let schema = resolve(root, schema)?;
    let next = match path.first() {
        None => {
            return Some(
                schema
                    .get("properties")?
                    .as_object()?
                    .keys()
                    .cloned()
                    .collect(),
            );
        }
        Some(Part::Field(name)) => schema
            .get("properties")
            .and_then(|properties| properties.get(name))
            .or_else(|| schema.get("additionalProperties"))?,
        Some(Part::Item) => schema.get("items")?,
    };
    fields_at(root, next, &path[1..])
}

/// Follows references, and takes the one alternative that is not null.
fn resolve<'a>(root: &'a Value, schema: &'a Value) -> Option<&'a Value> {
    if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
        return resolve(root, root.pointer(reference.strip_prefix('#')?)?);
    }
    let one_of = ["anyOf", "allOf", "oneOf"]
        .iter()
        .find_map(|keyword| schema.get(keyword));
    match one_of.and_then(Value::as_array) {
        Some(schemas) if schema.get("properties").is_none() => {
            let is_null = |s: &&Value| s.get("type").and_then(Value::as_str) == Some("null");
            resolve(root, schemas.iter().find(|schema| !is_null(schema))?)
        }
        _ => Some(schema),
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
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
            assert_eq!(kind.as_str(), kind.resource_kind());
            assert_eq!(Kind::parse(&kind.api_version(), kind.as_str()), Some(*kind));
        }
        assert_eq!(Kind::parse("v1", "Pod"), Some(Kind::Pod));
        assert_eq!(
            Kind::parse("gateway.networking.k8s.io/v1", "HTTPRoute"),
            Some(Kind::HttpRoute)
        );
        assert_eq!(Kind::parse("v1", "EgressPolicy"), None);
    }

    #[test]
    fn every_place_knows_its_fields() {
        use Part::{Field, Item};
        let fields = |kind: Kind, path: &[Part<'_>]| kind.fields(path).unwrap().join(" ");
        let rule = [Field("spec"), Field("allow"), Item];
        assert_eq!(
            fields(Kind::EgressPolicy, &rule),
            "cidrs hosts http ports tls"
        );
        assert_eq!(
            fields(Kind::EgressPolicy, &[]),
            "apiVersion kind metadata spec status"
        );
        let port = [Field("spec"), Field("ports"), Item];
        assert_eq!(
            fields(Kind::Service, &port),
            "appProtocol name nodePort port protocol targetPort"
        );
        assert!(fields(Kind::Pod, &[Field("metadata")]).contains("annotations"));
        let route = [Field("spec"), Field("rules"), Item, Field("timeouts")];
        assert_eq!(fields(Kind::HttpRoute, &route), "backendRequest request");
        assert_eq!(
            Kind::Pod.fields(&[Field("metadata"), Field("labels")]),
            None
        );
        assert_eq!(Kind::Pod.fields(&[Field("nowhere")]), None);
    }

    #[test]
    fn keys_name_kind_namespace_and_name() {
        let read = |yaml: &str, kind| {
            let value: Value = serde_saphyr::from_str(yaml).unwrap();
            Object::deserialize(kind, value).unwrap().key().to_string()
        };
        let pod = "{apiVersion: v1, kind: Pod, metadata: {name: a}}";
        assert_eq!(read(pod, Kind::Pod), "Pod default/a");
        let mesh = "{apiVersion: turnpike.dev/v1alpha1, kind: MeshConfig, \
                    metadata: {name: default, namespace: ignored}, spec: {}}";
        assert_eq!(read(mesh, Kind::MeshConfig), "MeshConfig default");
    }
}
