use std::sync::Arc;

use turnpike_rules::{
    route::RouteTable,
    service::{EndpointShard, Service, ServicePort},
};

use crate::{
    Model,
    facts::service::{Port, Service as Fact},
    key::Key,
};

impl Model {
    /// A Service by `cluster/namespace/name`, or with `@namespace` as callers of that namespace see
    /// it: the plain Service where they attached no route of their own.
    pub fn service(&self, name: &str) -> Option<Service> {
        let (name, consumer) = match name.split_once('@') {
            Some((name, consumer)) => (name, Some(consumer)),
            None => (name, None),
        };
        let key = self.read_name(name)?;
        let fact = self.services.get(&key)?;
        let consumer = consumer.filter(|consumer| {
            *consumer != &*key.namespace && !self.routes.attached(&key, consumer).is_empty()
        });
        let shards = self.services.shards(&key).map(|shards| shards.suffixes());
        let shards = shards.unwrap_or_default().into_iter();
        let policy = self.traffic.holding(&key);
        Some(Service {
            vips: fact.vips.clone(),
            ports: fact
                .ports
                .iter()
                .map(|port| self.service_port(fact, port, consumer))
                .collect(),
            traffic: policy
                .map(|policy| policy.policy.clone())
                .unwrap_or_default(),
            shards: shards
                .map(|suffix| self.shard_name(&key, &suffix).into())
                .collect(),
            consumer: consumer.map(Arc::from),
            key: self.service_key(&key),
        })
    }

    /// One shard of a Service's endpoints by `cluster/namespace/name/shard`.
    pub fn endpoints(&self, name: &str) -> Option<EndpointShard> {
        let (service, suffix) = name.rsplit_once('/')?;
        let key = self.read_name(service)?;
        self.services.get(&key)?;
        self.services.shards(&key)?.shard(name, suffix)
    }

    /// Routes of the consumer go before the producer's, port by port.
    fn service_port(&self, service: &Fact, port: &Port, consumer: Option<&str>) -> ServicePort {
        let own = consumer.map(|consumer| self.port_routes(&service.key, port, consumer));
        let routes = own
            .filter(|table| !table.routes.is_empty())
            .unwrap_or_else(|| self.port_routes(&service.key, port, &service.key.namespace));
        ServicePort {
            port: port.number,
            name: port.name.clone(),
            protocol: port.protocol,
            routes,
        }
    }

    fn port_routes(&self, service: &Key, port: &Port, namespace: &str) -> RouteTable {
        let attached = self.routes.attached(service, namespace).into_iter();
        let here = attached.filter(|route| {
            route
                .parents
                .iter()
                .any(|parent| parent.service == *service && parent.covers(port))
        });
        RouteTable::new(
            here.flat_map(|route| route.routes.iter().cloned())
                .collect(),
        )
    }
}
