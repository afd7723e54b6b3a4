//! Beside kube-proxy: its rules and ours stand on one node, and neither undoes the other.
//!
//! kube-proxy is played by a ruleset with the hooks, priorities, marks and chains of its nftables
//! mode; the cluster's own tests run the real one.

#![allow(clippy::unwrap_used, reason = "a test ends at what it cannot do")]

mod rig;

use std::{
    net::{IpAddr, Ipv4Addr, TcpListener},
    sync::mpsc::{Receiver, channel},
};

use rig::{
    INTERNET, NODE, Namespace, Pod, World, pod4,
    talk::{ANY, PATIENCE, ask, greet},
};
use turnpike_datapath::Datapath;
use turnpike_rules::pod::{Capture, InboundPort, Transport};

const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 80);
const NODE_PORT: u16 = 30080;
const API_SERVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// What a pod sees of callers whose source kube-proxy hides.
const HIDDEN: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// A Service with port 80 and a NodePort, both led to port 8080 of this pod, and the API server's,
/// led outside of the cluster.
fn kube_proxy(world: &World, endpoint: Ipv4Addr) {
    world.node.nft(&[&format!(
        "add table ip kube-proxy; delete table ip kube-proxy; table ip kube-proxy {{
            map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; }}
            map service-nodeports {{ type inet_proto . inet_service : verdict; }}
            chain mark-for-masquerade {{ mark set mark or 0x4000; }}
            chain masquerading {{
                mark and 0x4000 == 0 return
                mark set mark xor 0x4000
                masquerade fully-random
            }}
            chain endpoint-web {{
                ip saddr {endpoint} jump mark-for-masquerade
                meta l4proto tcp dnat to {endpoint}:8080
            }}
            chain service-web {{ numgen random mod 1 vmap {{ 0 : goto endpoint-web }}; }}
            chain external-web {{
                jump mark-for-masquerade
                goto service-web
            }}
            chain endpoint-kubernetes {{ meta l4proto tcp dnat to {INTERNET}:6443; }}
            chain services {{
                ip daddr . meta l4proto . th dport vmap @service-ips
                fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
            }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain nat-output {{ type nat hook output priority -100; jump services; }}
            chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
        }}
        add element ip kube-proxy service-ips {{ {VIP} . tcp . 80 : goto service-web,
            {API_SERVER} . tcp . 443 : goto endpoint-kubernetes }}
        add element ip kube-proxy service-nodeports {{ tcp . {NODE_PORT} : goto external-web }}"
    )]);
}

struct Scene {
    world: World,
    datapath: Datapath,
    /// On the primary ENI and on the secondary one.
    pods: [Pod; 2],
}

impl Scene {
    fn new(name: &str, change: impl Fn(&mut Pod)) -> Self {
        let world = World::new(name);
        let datapath = world.open();
        let pods = [5, 6].map(|number| {
            let mut pod = world.pod(number);
            change(&mut pod);
            pod.apply(&world, &datapath);
            pod
        });
        let (addresses, services) = ([INTERNET.into()], ["10.96.0.0/16".parse().unwrap()]);
        let cluster = datapath.set_members("cluster/static", &addresses, &services);
        world.wait(cluster).unwrap();
        Self {
            world,
            datapath,
            pods,
        }
    }

    /// Calls and what the callee sees of the caller, with the Service led to either pod.
    fn calls_arrive(&self) {
        let Self { world, pods, .. } = self;
        let [one, two] = pods;
        for pod in pods {
            greet(&pod.netns, (ANY, 8080));
        }
        greet(&world.outside, (ANY, 6443));
        for (callee, caller, callees, callers) in [(one, two, 5, 6), (two, one, 6, 5)] {
            kube_proxy(world, pod4(callees));
            let calls: [(&str, &Namespace, IpAddr, u16, IpAddr); 6] = [
                (
                    "pod to Service",
                    &caller.netns,
                    VIP.into(),
                    80,
                    pod4(callers).into(),
                ),
                (
                    "pod to its own Service",
                    &callee.netns,
                    VIP.into(),
                    80,
                    HIDDEN.into(),
                ),
                ("node to Service", &world.node, VIP.into(), 80, NODE.into()),
                (
                    "outside to NodePort",
                    &world.outside,
                    NODE.into(),
                    NODE_PORT,
                    HIDDEN.into(),
                ),
                (
                    "pod to NodePort",
                    &caller.netns,
                    NODE.into(),
                    NODE_PORT,
                    HIDDEN.into(),
                ),
                (
                    "pod to API server",
                    &callee.netns,
                    API_SERVER.into(),
                    443,
                    pod4(callees).into(),
                ),
            ];
            for (what, from, to, port, seen) in calls {
                let answer = ask(from, (to, port));
                let answer =
                    answer.unwrap_or_else(|error| panic!("{what}, pod {callees}: {error}"));
                assert_eq!(answer, seen, "{what}, pod {callees}");
            }
        }
    }
}

#[test]
fn services_and_node_ports_lead_to_pods_on_either_interface() {
    Scene::new("services", |_| ()).calls_arrive();
}

#[test]
fn they_do_for_pods_with_an_egress_policy() {
    let scene = Scene::new("services-sel", |pod| {
        pod.plan.policy.selected = true;
        // Callers from outside the cluster, by NodePort.
        pod.plan.policy.inbound = vec![InboundPort {
            transport: Transport::Tcp,
            port: 8080,
        }];
    });
    scene.calls_arrive();
    let counts = scene.world.wait(scene.datapath.counts()).unwrap();
    assert_eq!(counts.forward_original_offcluster.packets, 0);
    assert_eq!(counts.forward_denied.packets, 0);
}

/// Listens as the sidecar does, and tells of each connection.
fn sidecar(pod: &Namespace) -> Receiver<()> {
    let (sender, receiver) = channel();
    let listener = pod.run(|| TcpListener::bind((ANY, 15006)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            drop(stream.unwrap());
            let _ = sender.send(());
        }
    });
    receiver
}

#[test]
fn only_the_nodes_own_probes_pass_the_sidecar() {
    let scene = Scene::new("services-probe", |pod| {
        pod.plan.capture = Some(Capture {
            proxy_uid: 1337,
            outbound_port: 15001,
            inbound_port: 15006,
            probe_ports: vec![8080],
        });
    });
    let world = &scene.world;
    let neighbour = world.pod(7);
    neighbour.apply(world, &scene.datapath);
    for (pod, number) in scene.pods.iter().zip([5, 6]) {
        kube_proxy(world, pod4(number));
        let captured = sidecar(&pod.netns);
        greet(&pod.netns, (ANY, 8080));
        let own = IpAddr::from(pod4(number));
        assert_eq!(ask(&world.node, (own, 8080)).unwrap(), IpAddr::from(NODE));
        assert!(
            captured.try_recv().is_err(),
            "kubelet's probe of pod {number} was captured"
        );
        let callers: [(&str, &Namespace, IpAddr, u16); 5] = [
            ("outside", &world.outside, own, 8080),
            (
                "outside by NodePort",
                &world.outside,
                NODE.into(),
                NODE_PORT,
            ),
            ("neighbour", &neighbour.netns, own, 8080),
            ("neighbour by Service", &neighbour.netns, VIP.into(), 80),
            (
                "neighbour by NodePort",
                &neighbour.netns,
                NODE.into(),
                NODE_PORT,
            ),
        ];
        for (who, from, to, port) in callers {
            let answer = ask(from, (to, port));
            let told = captured.recv_timeout(PATIENCE);
            assert!(
                told.is_ok() && answer.is_err(),
                "{who} reached pod {number} past its sidecar: {answer:?}"
            );
        }
    }
}
