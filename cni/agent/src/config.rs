//! What was typed ([`Args`]) and what is valid ([`Settings`]).

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{ArgAction, Parser, builder::BoolishValueParser};
use ipnet::Ipv4Net;
use turnpike_ipam::Targets;
use turnpike_wire::channel::Controller;

use crate::install::Folders;

/// The node daemon of Turnpike: gives every pod of this node a VPC address, and its policy.
#[derive(Clone, Debug, Parser)]
#[command(name = "turnpike-node", version)]
pub struct Args {
    /// This node's name in Kubernetes.
    #[arg(long, env = "TURNPIKE_NODE_NAME")]
    pub node_name: String,
    #[arg(long, env = "TURNPIKE_CLUSTER", default_value = "cluster")]
    pub cluster: String,
    /// The controller's discovery, host:port.
    #[arg(long, env = "TURNPIKE_CONTROLLER")]
    pub controller: String,
    /// The name on the controller's certificate.
    #[arg(
        long,
        env = "TURNPIKE_CONTROLLER_NAME",
        default_value = "turnpike-controller.turnpike-system.svc"
    )]
    pub controller_name: String,
    /// The agent's service-account token.
    #[arg(long, env = "TURNPIKE_TOKEN_FILE")]
    pub token_file: PathBuf,
    /// The mesh's root certificates.
    #[arg(long, env = "TURNPIKE_ROOT_FILE")]
    pub root_file: PathBuf,
    /// Where the CNI executable finds the agent.
    #[arg(
        long,
        env = "TURNPIKE_CNI_SOCKET",
        default_value = "/run/turnpike/cni.sock"
    )]
    pub cni_socket: PathBuf,
    /// Where the gate finds the agent.
    #[arg(
        long,
        env = "TURNPIKE_FEED_SOCKET",
        default_value = "/run/turnpike/feed.sock"
    )]
    pub feed_socket: PathBuf,
    /// Leases, and the last policy heard. Must outlive the process.
    #[arg(
        long,
        env = "TURNPIKE_STATE_DIR",
        default_value = "/var/lib/turnpike/node"
    )]
    pub state_dir: PathBuf,
    /// Where the container runtime finds CNI executables; unset: none is installed.
    #[arg(long, env = "TURNPIKE_CNI_BIN_DIR", requires = "cni_conf_dir")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Where the container runtime finds CNI configurations.
    #[arg(long, env = "TURNPIKE_CNI_CONF_DIR", requires = "cni_bin_dir")]
    pub cni_conf_dir: Option<PathBuf>,
    /// The kernel's network settings; elsewhere in a container, whose own are read-only.
    #[arg(long, env = "TURNPIKE_SYSCTL_DIR", default_value = "/proc/sys/net")]
    pub sysctl_dir: PathBuf,
    /// Metrics; the next port serves introspection.
    #[arg(long, env = "TURNPIKE_HTTP", default_value = "127.0.0.1:61678")]
    pub http: SocketAddr,
    /// The user that the gate runs as: its group may read the feed.
    #[arg(long, env = "TURNPIKE_GATE_UID", default_value_t = 1338)]
    pub gate_uid: u32,
    /// Namespaces whose pods start before the control plane has spoken of them.
    #[arg(
        long,
        env = "TURNPIKE_EXEMPT_NAMESPACES",
        value_delimiter = ',',
        default_value = "kube-system,turnpike-system"
    )]
    pub exempt_namespaces: Vec<String>,
    /// Seconds that an ADD waits for its pod's policy.
    #[arg(long, env = "TURNPIKE_POLICY_WAIT", default_value_t = 10)]
    pub policy_wait: u64,
    /// Seconds that an ADD waits for an address when none is free.
    #[arg(long, env = "TURNPIKE_ADDRESS_WAIT", default_value_t = 20)]
    pub address_wait: u64,

    #[arg(long, env = "WARM_ENI_TARGET", default_value_t = 1, hide = true)]
    pub warm_eni_target: u32,
    #[arg(long, env = "WARM_IP_TARGET", default_value_t = 0, hide = true)]
    pub warm_ip_target: u32,
    #[arg(long, env = "MINIMUM_IP_TARGET", default_value_t = 0, hide = true)]
    pub minimum_ip_target: u32,
    /// 0 or less: what the instance type allows.
    #[arg(
        long,
        env = "MAX_ENI",
        default_value_t = 0,
        allow_hyphen_values = true,
        hide = true
    )]
    pub max_eni: i32,
    #[arg(long, env = "IP_COOLDOWN_PERIOD", default_value_t = 30, hide = true)]
    pub ip_cooldown_period: u64,
    #[arg(
        long,
        env = "AWS_VPC_K8S_CNI_EXTERNALSNAT",
        default_value = "false",
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new(),
        hide = true
    )]
    pub external_snat: bool,
    #[arg(
        long,
        env = "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
        value_delimiter = ',',
        hide = true
    )]
    pub exclude_snat_cidrs: Vec<String>,
    #[arg(long, env = "AWS_VPC_ENI_MTU", default_value_t = 9001, hide = true)]
    pub eni_mtu: u32,
    /// 0: as the ENI's.
    #[arg(long, env = "POD_MTU", default_value_t = 0, hide = true)]
    pub pod_mtu: u32,
    /// Tags for the interfaces that this node makes, as a JSON object.
    #[arg(long, env = "ADDITIONAL_ENI_TAGS", default_value = "{}", hide = true)]
    pub additional_eni_tags: String,
    /// For the tag cluster.k8s.amazonaws.com/name.
    #[arg(long, env = "CLUSTER_NAME", default_value = "", hide = true)]
    pub cluster_name: String,
    #[arg(
        long,
        env = "DISABLE_LEAKED_ENI_CLEANUP",
        default_value = "false",
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new(),
        hide = true
    )]
    pub disable_leaked_eni_cleanup: bool,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{variable}: `{value}` {problem}")]
pub struct InvalidSetting {
    pub variable: &'static str,
    pub value: String,
    pub problem: String,
}

/// Checked settings.
#[derive(Clone, Debug)]
pub struct Settings {
    pub node_name: String,
    pub cluster: String,
    pub controller: Controller,
    pub cni_socket: PathBuf,
    pub feed_socket: PathBuf,
    pub state_dir: PathBuf,
    pub install: Option<Folders>,
    pub sysctl_dir: PathBuf,
    pub metrics: SocketAddr,
    pub introspection: SocketAddr,
    pub gate_uid: u32,
    pub exempt_namespaces: Vec<String>,
    pub policy_wait: Duration,
    pub address_wait: Duration,
    pub targets: Targets,
    pub cooldown: Duration,
    pub external_snat: bool,
    pub exclude_snat: Vec<Ipv4Net>,
    pub eni_mtu: u32,
    pub pod_mtu: u32,
    pub eni_tags: std::collections::BTreeMap<String, String>,
    pub keep_leaked: bool,
}

const MTU_MIN: u32 = 576;
const MTU_MAX: u32 = 9001;

impl TryFrom<Args> for Settings {
    type Error = InvalidSetting;

    fn try_from(args: Args) -> Result<Self, InvalidSetting> {
        let Args {
            node_name,
            cluster,
            controller,
            controller_name,
            token_file,
            root_file,
            cni_socket,
            feed_socket,
            state_dir,
            cni_bin_dir,
            cni_conf_dir,
            sysctl_dir,
            http,
            gate_uid,
            exempt_namespaces,
            policy_wait,
            address_wait,
            warm_eni_target,
            warm_ip_target,
            minimum_ip_target,
            max_eni,
            ip_cooldown_period,
            external_snat,
            exclude_snat_cidrs,
            eni_mtu,
            pod_mtu,
            additional_eni_tags,
            cluster_name,
            disable_leaked_eni_cleanup,
        } = args;
        let Some(next_port) = http.port().checked_add(1) else {
            return Err(invalid(
                "TURNPIKE_HTTP",
                http,
                "has no next port for introspection",
            ));
        };
        let cooldown = cooldown(ip_cooldown_period)?;
        let eni_mtu = mtu("AWS_VPC_ENI_MTU", eni_mtu)?;
        let pod_mtu = if pod_mtu == 0 {
            eni_mtu
        } else {
            mtu("POD_MTU", pod_mtu)?
        };
        Ok(Self {
            node_name,
            cluster,
            controller: Controller {
                address: filled_in("TURNPIKE_CONTROLLER", controller)?,
                server_name: controller_name,
                root_file,
                token_file,
            },
            cni_socket,
            feed_socket,
            state_dir,
            install: cni_bin_dir
                .zip(cni_conf_dir)
                .map(|(bin, conf)| Folders { bin, conf }),
            sysctl_dir,
            metrics: http,
            introspection: SocketAddr::new(loopback(http.ip()), next_port),
            gate_uid,
            exempt_namespaces,
            policy_wait: Duration::from_secs(policy_wait),
            address_wait: Duration::from_secs(address_wait),
            targets: targets(warm_eni_target, warm_ip_target, minimum_ip_target, max_eni),
            cooldown,
            external_snat,
            exclude_snat: networks(&exclude_snat_cidrs)?,
            eni_mtu,
            pod_mtu,
            eni_tags: tags(&additional_eni_tags, cluster_name)?,
            keep_leaked: disable_leaked_eni_cleanup,
        })
    }
}

/// Introspection names pods: it stays on the machine even where metrics do not.
fn loopback(metrics: IpAddr) -> IpAddr {
    match metrics {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
    }
}

fn invalid(
    variable: &'static str,
    value: impl ToString,
    problem: impl Into<String>,
) -> InvalidSetting {
    InvalidSetting {
        variable,
        value: value.to_string(),
        problem: problem.into(),
    }
}

fn targets(enis: u32, addresses: u32, minimum: u32, max_enis: i32) -> Targets {
    let given = |number: u32| (number > 0).then_some(number);
    Targets {
        warm_enis: enis,
        warm_addresses: given(addresses),
        minimum_addresses: given(minimum),
        max_enis: u32::try_from(max_enis).ok().and_then(given),
    }
}

/// Kubelet leaves `$(…)` as it is where a Service did not exist when it started the container. It
/// starts the container again, and knows the Service then.
fn filled_in(variable: &'static str, value: String) -> Result<String, InvalidSetting> {
    if value.contains("$(") {
        let problem = "was not filled in by kubelet: the Service did not exist when this container \
                       was started";
        return Err(invalid(variable, value, problem));
    }
    Ok(value)
}

fn cooldown(seconds: u64) -> Result<Duration, InvalidSetting> {
    const DAY: u64 = 86_400;
    if seconds > DAY {
        return Err(invalid(
            "IP_COOLDOWN_PERIOD",
            seconds,
            "is longer than a day",
        ));
    }
    Ok(Duration::from_secs(seconds))
}

fn mtu(variable: &'static str, value: u32) -> Result<u32, InvalidSetting> {
    if (MTU_MIN..=MTU_MAX).contains(&value) {
        return Ok(value);
    }
    Err(invalid(
        variable,
        value,
        format!("is not between {MTU_MIN} and {MTU_MAX}"),
    ))
}

fn networks(texts: &[String]) -> Result<Vec<Ipv4Net>, InvalidSetting> {
    let parse = |text: &String| {
        text.trim().parse().map_err(|_| {
            invalid(
                "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
                text,
                "is not an IPv4 CIDR",
            )
        })
    };
    texts
        .iter()
        .filter(|text| !text.trim().is_empty())
        .map(parse)
        .collect()
}

fn tags(
    json: &str,
    cluster_name: String,
) -> Result<std::collections::BTreeMap<String, String>, InvalidSetting> {
    let mut tags: std::collections::BTreeMap<String, String> =
        serde_json::from_str(json).map_err(|error| {
            invalid(
                "ADDITIONAL_ENI_TAGS",
                json,
                format!("is no JSON object of texts: {error}"),
            )
        })?;
    if let Some(key) = tags
        .keys()
        .find(|key| key.starts_with("node.k8s.amazonaws.com/"))
    {
        return Err(invalid(
            "ADDITIONAL_ENI_TAGS",
            key,
            "is a key that the agent sets itself",
        ));
    }
    if !cluster_name.is_empty() {
        tags.insert("cluster.k8s.amazonaws.com/name".into(), cluster_name);
    }
    Ok(tags)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(extra: &[&str]) -> Result<Settings, InvalidSetting> {
        let base = ["x", "--node-name=n", "--token-file=t", "--root-file=r"];
        let given = extra.iter().any(|flag| flag.starts_with("--controller="));
        let controller = (!given).then_some("--controller=c:1");
        Args::try_parse_from(
            base.into_iter()
                .chain(controller)
                .chain(extra.iter().copied()),
        )
        .unwrap()
        .try_into()
    }

    #[test]
    fn defaults_are_the_aws_cnis() {
        let settings = parse(&[]).unwrap();
        assert_eq!(settings.targets, Targets::default());
        assert_eq!(settings.cooldown, Duration::from_secs(30));
        assert_eq!((settings.eni_mtu, settings.pod_mtu), (9001, 9001));
        assert_eq!(settings.introspection.port(), 61679);
        assert!(!settings.external_snat);
    }

    #[test]
    fn what_is_wrong_names_its_variable() {
        for (flag, variable) in [
            ("--pod-mtu=100", "POD_MTU"),
            ("--eni-mtu=65000", "AWS_VPC_ENI_MTU"),
            (
                "--exclude-snat-cidrs=10.0.0.0/8,x",
                "AWS_VPC_K8S_CNI_EXCLUDE_SNAT_CIDRS",
            ),
            ("--additional-eni-tags=[]", "ADDITIONAL_ENI_TAGS"),
            ("--ip-cooldown-period=100000", "IP_COOLDOWN_PERIOD"),
            (
                "--controller=$(TURNPIKE_CONTROLLER_SERVICE_HOST):15012",
                "TURNPIKE_CONTROLLER",
            ),
        ] {
            assert_eq!(parse(&[flag]).unwrap_err().variable, variable);
        }
    }

    #[test]
    fn max_eni_of_minus_one_is_no_cap() {
        assert_eq!(parse(&["--max-eni=-1"]).unwrap().targets.max_enis, None);
        assert_eq!(parse(&["--max-eni=2"]).unwrap().targets.max_enis, Some(2));
    }
}
