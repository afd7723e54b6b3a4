//! HTTPRoutes attached to Services.

use std::{collections::BTreeSet, sync::Arc};

use turnpike_api::{
    HttpRoute,
    valid::{self, Invalid},
};
use turnpike_rules::route::Filter;

use super::service::Port;
use crate::key::{Birth, Key};

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Route {
    pub(crate) key: Key,
    pub(crate) birth: Birth,
    pub(crate) parents: Vec<Parent>,
    pub(crate) routes: Vec<Arc<turnpike_rules::route::Route>>,
    /// It has `hostnames`, which mean nothing here.
    pub(crate) names_hosts: bool,
    /// Where it names backends that are no Services.
    pub(crate) unknown: Vec<String>,
}

/// A Service that a route is attached to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parent {
    pub(crate) service: Key,
    /// `None`: all its ports.
    pub(crate) port: Option<u16>,
    /// Name of a port.
    pub(crate) section: Option<Arc<str>>,
}

impl Route {
    pub(crate) fn read(object: &HttpRoute, cluster: &str) -> Result<Self, Invalid> {
        let valid::Routes {
            parents,
            routes,
            names_hosts,
            unknown,
        } = valid::http_route(object, cluster)?;
        // Whose routes hold for whom follows from the two namespaces.
        let parents = parents.into_iter().map(|parent| Parent {
            service: Key {
                namespace: parent.namespace,
                name: parent.name,
            },
            port: parent.port,
            section: parent.section,
        });
        Ok(Self {
            key: Key::of(&object.metadata),
            birth: Birth::of(&object.metadata),
            parents: parents.collect(),
            routes,
            names_hosts,
            unknown,
        })
    }

    /// Services and ports that requests may be sent or mirrored to.
    pub(crate) fn backends(&self) -> BTreeSet<(Key, u16)> {
        let mut found = BTreeSet::new();
        let key = |service: &turnpike_rules::ServiceKey| Key {
            namespace: service.namespace.clone(),
            name: service.name.clone(),
        };
        for route in &self.routes {
            let of_backends = route.backends.iter().flat_map(|backend| &backend.filters);
            for filter in route.filters.iter().chain(of_backends) {
                if let Filter::Mirror { service, port, .. } = filter {
                    found.insert((key(service), *port));
                }
            }
            let to = route.backends.iter().filter_map(|b| b.to.as_ref());
            found.extend(to.map(|(service, port)| (key(service), *port)));
        }
        found
    }
}

impl Parent {
    pub(crate) fn covers(&self, port: &Port) -> bool {
        self.port.is_none_or(|number| number == port.number)
            && self.section.as_ref().is_none_or(|name| *name == port.name)
    }
}
