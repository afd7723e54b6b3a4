//! MeshConfig, PeerAuthentication, Telemetry.

use std::net::IpAddr;

use ipnet::IpNet;
use turnpike_rules::workload::{MtlsMode, Telemetry as Reported};

use super::{
    Invalid, PodSelector,
    problems::{self, Problems},
    selector,
};
use crate::kinds::{
    self, MeshConfig, MeshConfigSpec, PeerAuthentication, PeerAuthenticationSpec, Telemetry,
    TelemetrySpec,
};

/// What holds for the whole mesh.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct MeshSettings {
    pub mesh_prefixes: Vec<IpNet>,
    pub service_cidrs: Vec<IpNet>,
    pub cluster_addresses: Vec<IpAddr>,
    pub mtls: MtlsMode,
    pub telemetry: Reported,
}

/// A PeerAuthentication, and the pods it is about.
#[derive(Clone, Debug, PartialEq)]
pub struct PeerMtls {
    pub selector: PodSelector,
    /// `None`: as the next less specific one says.
    pub mtls: Option<MtlsMode>,
    pub ports: Vec<(u16, MtlsMode)>,
}

/// A Telemetry, and the pods it is about. `None`: as MeshConfig says.
#[derive(Clone, Debug, PartialEq)]
pub struct Reporting {
    pub selector: PodSelector,
    pub sampling: Option<f64>,
    pub access_log: Option<bool>,
}

pub fn mesh_config(object: &MeshConfig) -> Result<MeshSettings, Invalid> {
    let MeshConfigSpec {
        mesh_prefixes,
        service_cidrs,
        cluster_addresses,
        mtls,
        telemetry,
    } = &object.spec;
    let mut problems = Problems::default();
    let name = object.metadata.name.as_deref().unwrap_or_default();
    if name != "default" {
        problems.add(
            "metadata.name",
            name,
            "there is one MeshConfig, named `default`",
        );
    }
    let mut ranges = |name: &str, list: &[String]| -> Vec<IpNet> {
        let valid = list.iter().enumerate().filter_map(|(i, text)| {
            problems.take(format!("spec.{name}[{i}]"), text, problems::cidr(text))
        });
        valid.collect()
    };
    let mesh_prefixes = ranges("meshPrefixes", mesh_prefixes);
    let service_cidrs = ranges("serviceCidrs", service_cidrs);
    let cluster_addresses = cluster_addresses
        .iter()
        .enumerate()
        .filter_map(|(i, text)| {
            let address = text.parse().map_err(|_| "allowed is one IP address");
            problems.take(format!("spec.clusterAddresses[{i}]"), text, address)
        })
        .collect();
    let default = Reported::default();
    let typed = telemetry.clone().unwrap_or_default();
    check_sampling(&mut problems, "spec.telemetry.sampling", typed.sampling);
    problems.finish(MeshSettings {
        mesh_prefixes,
        service_cidrs,
        cluster_addresses,
        mtls: mtls.as_ref().map(mode).unwrap_or_default(),
        telemetry: Reported {
            sampling: typed.sampling.unwrap_or(default.sampling),
            access_log: typed.access_log.unwrap_or(default.access_log),
        },
    })
}

pub fn peer_authentication(object: &PeerAuthentication) -> Result<PeerMtls, Invalid> {
    let PeerAuthenticationSpec {
        selector: typed_selector,
        mtls,
        port_level_mtls,
    } = &object.spec;
    let mut problems = Problems::default();
    let selector = selector(&mut problems, "spec.selector", typed_selector.as_ref());
    if mtls.is_none() && port_level_mtls.is_empty() {
        problems.add(
            "spec",
            "{}",
            "it says nothing; set mtls.mode to PERMISSIVE or STRICT",
        );
    }
    let wide = selector.as_ref().is_some_and(PodSelector::selects_all);
    if wide && !port_level_mtls.is_empty() {
        let ports: Vec<&str> = port_level_mtls.keys().map(String::as_str).collect();
        problems.add(
            "spec.portLevelMtls",
            ports.join(", "),
            "ports are those of the pods that a selector names, and it has none; give \
             spec.selector, or set spec.mtls alone",
        );
    }
    let ports = port_level_mtls
        .iter()
        .filter_map(|(text, mtls)| {
            let port = text.parse().ok().filter(|port| *port != 0);
            let port = port.ok_or("allowed are ports from 1 to 65535");
            let field = format!("spec.portLevelMtls.{text}");
            problems
                .take(field, text, port)
                .map(|port| (port, mode(mtls)))
        })
        .collect();
    let mtls = mtls.as_ref().map(mode);
    problems.finish_some(selector.map(|selector| PeerMtls {
        selector,
        mtls,
        ports,
    }))
}

pub fn telemetry(object: &Telemetry) -> Result<Reporting, Invalid> {
    let TelemetrySpec {
        selector: typed_selector,
        sampling,
        access_log,
    } = &object.spec;
    let mut problems = Problems::default();
    let selector = selector(&mut problems, "spec.selector", typed_selector.as_ref());
    check_sampling(&mut problems, "spec.sampling", *sampling);
    let (sampling, access_log) = (*sampling, *access_log);
    problems.finish_some(selector.map(|selector| Reporting {
        selector,
        sampling,
        access_log,
    }))
}

fn mode(typed: &kinds::Mtls) -> MtlsMode {
    match typed.mode {
        kinds::MtlsMode::Permissive => MtlsMode::Permissive,
        kinds::MtlsMode::Strict => MtlsMode::Strict,
    }
}

fn check_sampling(problems: &mut Problems, field: &str, sampling: Option<f64>) {
    if let Some(sampling) = sampling.filter(|share| !(0.0..=1.0).contains(share)) {
        problems.add(field, sampling, "allowed is a share from 0 to 1");
    }
}
