//! A pod's control side beside a controller that the test decides on.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use tokio::{sync::watch, time::timeout};
use turnpike_rules::{
    Identity, ServiceKey,
    authz::Authorization,
    service::{
        Endpoint, EndpointShard, EndpointState, PortMapping, Protocol, Service, ServicePort,
    },
    traffic::TrafficPolicy,
    workload::{Destination, MtlsMode, Names, SelfConfig, Telemetry, Workload},
};
use turnpike_sidecar::control::{Control, ControlConfig};

use crate::controller::{PATIENCE, TestController};

pub(crate) const UID: &str = "0b7c2a52-web";

pub(crate) fn web() -> Identity {
    Identity::new("cluster.local", "shop", "web").unwrap()
}

pub(crate) fn key(name: &str) -> ServiceKey {
    ServiceKey::new("cluster", "shop", name)
}

pub(crate) fn ip(last: u8) -> IpAddr {
    [10, 0, 0, last].into()
}

pub(crate) fn own() -> SelfConfig {
    SelfConfig {
        uid: UID.into(),
        namespace: "shop".into(),
        name: "web-1".into(),
        identity: web(),
        names: Names::unlabelled("web", "shop").into(),
        zone: "a".into(),
        ports: vec![],
        probe_ports: vec![],
        mtls: MtlsMode::Permissive,
        port_mtls: vec![],
        authorization: Authorization::default(),
        backs: vec![],
        telemetry: Telemetry::default(),
        mesh_prefixes: vec!["10.0.0.0/16".parse().unwrap()],
    }
}

pub(crate) fn workload(last: u8) -> Destination {
    Destination::Workload(Workload {
        uid: format!("uid-{last}").into(),
        namespace: "shop".into(),
        name: format!("pod-{last}").into(),
        address: ip(last),
        identity: Some(web()),
        service: None,
        ports: vec![],
        names: None,
    })
}

pub(crate) fn service(name: &str, shards: &[&str]) -> Service {
    let key = key(name);
    let shards = shards
        .iter()
        .map(|shard| format!("{key}/{shard}").into())
        .collect();
    let port = ServicePort {
        port: 80,
        name: "http".into(),
        protocol: Protocol::Http1,
        routes: Default::default(),
    };
    Service {
        key,
        consumer: None,
        vips: vec![[10, 0, 96, 1].into()],
        ports: vec![port],
        traffic: TrafficPolicy::default(),
        shards,
    }
}

pub(crate) fn shard(name: &str, shard: &str, lasts: &[u8]) -> EndpointShard {
    let endpoint = |last: &u8| Endpoint {
        uid: format!("uid-{last}").into(),
        address: ip(*last),
        identity: Some(web()),
        zone: "a".into(),
        state: EndpointState::Serving,
        names: None,
    };
    EndpointShard {
        name: format!("{}/{shard}", key(name)).into(),
        ports: vec![PortMapping {
            service_port: 80,
            target_port: 8080,
        }],
        endpoints: lasts.iter().map(endpoint).collect(),
    }
}

pub(crate) struct Pod {
    pub(crate) server: TestController,
    pub(crate) control: Control,
}

pub(crate) fn config(server: &TestController, state_dir: Option<&Path>) -> ControlConfig {
    ControlConfig {
        controller: server.client(),
        cluster: "cluster".into(),
        network: "default".into(),
        pod_uid: UID.into(),
        identity: web(),
        state_dir: state_dir.map(Into::into),
    }
}

impl Pod {
    /// One whose own configuration and certificate have come.
    pub(crate) async fn start(state_dir: Option<&Path>) -> Self {
        let server = TestController::start().await;
        server.put(UID, "1", &own());
        let control = Control::start(config(&server, state_dir));
        let pod = Self { server, control };
        pod.ready().await;
        pod
    }

    pub(crate) async fn ready(&self) -> watch::Receiver<Arc<SelfConfig>> {
        timeout(PATIENCE, self.control.ready())
            .await
            .expect("must become ready")
    }

    /// Puts a Service and its shards into the world.
    pub(crate) fn put_service(&self, version: &str, name: &str, shards: &[(&str, &[u8])]) {
        for (part, lasts) in shards {
            let shard = shard(name, part, lasts);
            self.server.put(&shard.name.clone(), version, &shard);
        }
        let names: Vec<&str> = shards.iter().map(|(part, _)| *part).collect();
        self.server
            .put(&view(name), version, &service(name, &names));
    }
}

/// The name under which this pod asks for a Service.
pub(crate) fn view(name: &str) -> String {
    format!("{}@shop", key(name))
}

/// Polls what has no event to wait for.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "never: {what}");
}
