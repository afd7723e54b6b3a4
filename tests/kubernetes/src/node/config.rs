//! What the programs of a node are told.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use turnpike_vpc::netns::{Command, Namespace};

use super::{Plan, init::Service};
use crate::images::PAUSE;

const CLUSTER_DNS: &str = "10.96.0.10";

/// Files of the node's disk: path and text.
pub(super) fn files(plan: &Plan<'_>, group: &str) -> Vec<(String, String)> {
    let name = plan.name;
    vec![
        ("etc/hostname".to_owned(), format!("{name}\n")),
        (
            "etc/machine-id".to_owned(),
            format!(
                "{}\n",
                plan.instance
                    .id
                    .trim_start_matches("i-")
                    .repeat(2)
                    .chars()
                    .take(32)
                    .collect::<String>()
            ),
        ),
        (
            "etc/hosts".to_owned(),
            format!("127.0.0.1 localhost\n{} {name}\n", plan.instance.address),
        ),
        // The VPC's own resolver, as DHCP tells an instance.
        (
            "etc/resolv.conf".to_owned(),
            "nameserver 10.0.0.2\n".to_owned(),
        ),
        ("etc/containerd/config.toml".to_owned(), containerd()),
        (
            "etc/kubernetes/kubelet.yaml".to_owned(),
            kubelet(plan, group).to_string(),
        ),
        (
            "etc/kubernetes/kube-proxy.yaml".to_owned(),
            kube_proxy(name).to_string(),
        ),
    ]
}

/// What is kept running, in the order of starting.
pub(super) fn services(plan: &Plan<'_>) -> Vec<Service> {
    let service = |name: &str, arguments: &[&str]| Service {
        name: name.to_owned(),
        arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
    };
    let labels = format!(
        "--node-labels=topology.kubernetes.io/zone={},topology.kubernetes.io/region={},node.kubernetes.io/instance-type={}",
        plan.instance.zone,
        plan.instance
            .zone
            .trim_end_matches(|c: char| c.is_ascii_lowercase()),
        plan.instance.instance_type
    );
    vec![
        service("containerd", &[]),
        service(
            "kubelet",
            &[
                "--config=/etc/kubernetes/kubelet.yaml",
                "--kubeconfig=/etc/kubernetes/kubelet.conf",
                "--cert-dir=/var/lib/kubelet/pki",
                &format!("--hostname-override={}", plan.name),
                &format!("--node-ip={}", plan.instance.address),
                &labels,
            ],
        ),
        service("kube-proxy", &["--config=/etc/kubernetes/kube-proxy.yaml"]),
    ]
}

fn containerd() -> String {
    format!(
        r#"version = 2
# Without what this kernel or this machine may not have.
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  stream_server_address = "127.0.0.1"
  disable_apparmor = true
  # In a container without CAP_SYS_RESOURCE, runc may not lower a score and ends without a word.
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"#
    )
}

fn kubelet(plan: &Plan<'_>, group: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "address": plan.instance.address,
        "healthzBindAddress": "127.0.0.1",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true},
            "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": "/etc/kubernetes/kubelet.crt",
        "tlsPrivateKeyFile": "/etc/kubernetes/kubelet.key",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "providerID": format!("aws:///{}/{}", plan.instance.zone, plan.instance.id),
        "maxPods": max_pods(&plan.instance.instance_type),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": group,
        "enforceNodeAllocatable": ["pods"],
        // Version 1 of control groups is refused otherwise.
        "failCgroupV1": false,
        "failSwapOn": false,
        "clusterDomain": "cluster.local",
        "clusterDNS": [CLUSTER_DNS],
        "resolvConf": "/etc/resolv.conf",
        "makeIPTablesUtilChains": false,
        "nodeStatusUpdateFrequency": "4s",
        // There is no registry to get an image back from.
        "imageGCHighThresholdPercent": 100,
        // Two nodes share one machine's disk and memory. A share of either would be far too much on
        // a large machine, and the box would evict itself.
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "200Mi", "nodefs.inodesFree": "1%",
            "imagefs.available": "200Mi", "imagefs.inodesFree": "1%",
        },
    })
}

fn kube_proxy(name: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "hostnameOverride": name,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "clientConnection": {"kubeconfig": "/etc/kubernetes/kube-proxy.conf"},
        // Sizes of the connection table are the whole machine's, and not for a node to set.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

/// As EKS tells its kubelets: interfaces × (addresses − 1) + 2.
fn max_pods(instance_type: &str) -> u32 {
    match instance_type {
        "t3.medium" => 17,
        _ => 29,
    }
}

/// A machine that boots has only what its firmware and DHCP give it: the first interface.
pub(super) fn forget_network(namespace: &Namespace) -> Result<()> {
    const SCRIPT: &str = r#"
nft flush ruleset
for family in -4 -6; do
  ip $family rule list | while IFS=: read -r preference rest; do
    case $preference in 0|32766|32767) ;; *) ip $family rule del pref $preference ;; esac
  done
  ip $family route show table all | grep -o 'table [0-9]*' | sort -u | while read -r _ table; do
    ip $family route flush table $table
  done
done
ip -o link show | while IFS=': ' read -r _ link _; do
  link=${link%@*}
  [ "$link" = lo ] && continue
  ip -o -4 addr show dev $link | grep -q . && [ "$link" = "$(ip -4 route show default | sed 's/.* dev \([^ ]*\).*/\1/' | head -1)" ] && continue
  ip addr flush dev $link
  ip link set $link down
done
"#;
    let output = Command::new("sh").args(["-c", SCRIPT]).output(namespace)?;
    ensure!(
        output.status.success(),
        "forgetting the network of {}: {}",
        namespace.name(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
