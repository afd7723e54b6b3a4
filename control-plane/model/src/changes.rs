//! What a change of one object touched: names of resources, by type.

use std::{collections::BTreeSet, fmt, sync::Arc};

/// The resources that the model answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResourceType {
    /// A pod's own configuration, by UID.
    SelfConfig,
    /// What stands at an address, by `network/ip`.
    Address,
    /// `cluster/namespace/name`, with `@namespace` for a consumer's view.
    Service,
    /// `cluster/namespace/name/shard`.
    Endpoints,
    /// `cluster/namespace/pod`, for the agent of its node.
    PodNetwork,
    /// `cluster/namespace/pod`, for the gate of its node.
    PodEgress,
    /// `cluster/node` or `cluster/static`.
    Members,
}

impl ResourceType {
    pub const ALL: [Self; 7] = [
        Self::SelfConfig,
        Self::Address,
        Self::Service,
        Self::Endpoints,
        Self::PodNetwork,
        Self::PodEgress,
        Self::Members,
    ];
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SelfConfig => "Self",
            Self::Address => "Address",
            Self::Service => "Service",
            Self::Endpoints => "Endpoints",
            Self::PodNetwork => "PodNetwork",
            Self::PodEgress => "PodEgress",
            Self::Members => "Members",
        })
    }
}

/// Every resource whose content may differ from before, created and removed ones included.
///
/// A resource that is not in the set is certainly the same; one that is may turn out equal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes(BTreeSet<(ResourceType, Arc<str>)>);

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn contains(&self, kind: ResourceType, name: &str) -> bool {
        self.0.contains(&(kind, name.into()))
    }

    pub fn iter(&self) -> impl Iterator<Item = (ResourceType, &Arc<str>)> {
        self.0.iter().map(|(kind, name)| (*kind, name))
    }

    /// Adds all that `other` touched, so that several objects can be announced as one change.
    pub fn merge(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn touch(&mut self, kind: ResourceType, name: impl Into<Arc<str>>) {
        self.0.insert((kind, name.into()));
    }
}

impl IntoIterator for Changes {
    type Item = (ResourceType, Arc<str>);
    type IntoIter = std::collections::btree_set::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}
