//! A node, pods and an outside, as network namespaces without an uplink.
//!
//! `outside` is the VPC's router and everything beyond: 10.0.1.1, and 203.0.113.66 and 2001:db8::66
//! for the internet. The node has two ENIs there; pods hang on the node by what is under test.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod frame;
pub(crate) mod talk;

use std::{
    fs::{self, File},
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
};

use futures_util::TryStreamExt as _;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use turnpike_datapath::{
    Applied, Datapath, Eni, Mac, NodePlan, PodKey, PodPlan, PodPolicy, PrimaryEni,
};

pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 10);
pub(crate) const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 10);
pub(crate) const INTERNET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 66);
pub(crate) const INTERNET6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x66);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const PRIMARY_MAC: Mac = Mac([2, 0, 0, 0, 0, 0x10]);
pub(crate) const SECONDARY_MAC: Mac = Mac([2, 0, 0, 0, 0, 0x11]);

/// A named network namespace; gone when dropped, and replaced if an earlier run left it.
#[derive(Clone, Debug)]
pub(crate) struct Namespace(Arc<Mounted>);

#[derive(Debug)]
struct Mounted {
    path: PathBuf,
    file: File,
}

impl Namespace {
    pub(crate) fn new(name: &str) -> Self {
        assert!(
            nix::unistd::Uid::effective().is_root(),
            "this test makes network namespaces: run it as root"
        );
        let path = PathBuf::from("/run/netns").join(name);
        fs::create_dir_all("/run/netns").unwrap();
        discard(&path);
        File::create(&path).unwrap();
        let target = path.clone();
        let make = move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let none = None::<&str>;
            mount(
                Some("/proc/thread-self/ns/net"),
                &target,
                none,
                MsFlags::MS_BIND,
                none,
            )
            .unwrap();
        };
        std::thread::spawn(make).join().unwrap();
        let file = File::open(&path).unwrap();
        let namespace = Self(Arc::new(Mounted { path, file }));
        // Duplicate address detection would hold every new link back for a second.
        namespace.sysctl("ipv6/conf/default/accept_dad", "0");
        namespace.configure(|handle| async move {
            let lo = LinkMessageBuilder::<LinkUnspec>::new()
                .index(1)
                .up()
                .build();
            handle.link().set(lo).execute().await
        });
        namespace
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path.clone()
    }

    pub(crate) fn enter(&self) {
        setns(&self.0.file, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// Runs `work` on a thread inside.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.start(work).join().unwrap()
    }

    pub(crate) fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let inside = self.clone();
        std::thread::spawn(move || {
            inside.enter();
            work()
        })
    }

    /// A runtime all of whose threads are inside.
    pub(crate) fn runtime(&self) -> tokio::runtime::Runtime {
        let inside = self.clone();
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(move || inside.enter())
            .build()
            .unwrap()
    }

    pub(crate) fn configure<F>(&self, work: impl FnOnce(rtnetlink::Handle) -> F + Send + 'static)
    where
        F: Future<Output = Result<(), rtnetlink::Error>>,
    {
        self.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                work(handle).await.unwrap();
            });
        });
    }

    pub(crate) fn nft(&self, arguments: &[&str]) -> String {
        let arguments: Vec<_> = arguments.iter().map(|it| (*it).to_owned()).collect();
        self.run(move || {
            let output = std::process::Command::new("nft")
                .args(arguments)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        })
    }

    pub(crate) fn sysctl(&self, name: &str, value: &str) {
        let (path, value) = (PathBuf::from("/proc/sys/net").join(name), value.to_owned());
        self.run(move || fs::write(path, value)).unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        discard(&self.path);
    }
}

fn discard(path: &PathBuf) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

/// The world of one test.
pub(crate) struct World {
    pub(crate) name: String,
    pub(crate) node: Namespace,
    pub(crate) outside: Namespace,
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl World {
    pub(crate) fn new(name: &str) -> Self {
        let node = Namespace::new(&format!("tpt-{name}-node"));
        let outside = Namespace::new(&format!("tpt-{name}-out"));
        for (end, peer, mac) in [("eth0", "e0", PRIMARY_MAC), ("eth1", "e1", SECONDARY_MAC)] {
            connect(&node, end, mac, &outside, peer);
        }
        node.configure(node_side);
        outside.configure(outside_side);
        for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            outside.sysctl(setting, "1");
        }
        let runtime = node.runtime();
        Self {
            name: name.to_owned(),
            node,
            outside,
            runtime,
        }
    }

    pub(crate) fn plan(&self) -> NodePlan {
        NodePlan {
            primary: PrimaryEni {
                mac: PRIMARY_MAC,
                address: NODE,
                address6: Some(NODE6),
            },
            secondary: vec![Eni {
                mac: SECONDARY_MAC,
                table: 2,
                address: [10, 0, 1, 11].into(),
                gateway: [10, 0, 1, 1].into(),
                gateway6: Some("fe80::1".parse().unwrap()),
                mtu: 1500,
            }],
            snat: None,
            sysctls: "/proc/sys/net".into(),
        }
    }

    pub(crate) fn open(&self) -> Datapath {
        self.wait(async { Datapath::open(&self.plan()).await })
            .unwrap()
    }

    /// Runs a future on the node.
    pub(crate) fn wait<F: Future<Output: Send> + Send>(&self, future: F) -> F::Output {
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                self.node.enter();
                self.runtime.block_on(future)
            });
            waiting.join().unwrap()
        })
    }

    /// A pod's namespace and plan: address 10.0.1.N, fd00:1::N; even ones on the secondary ENI.
    pub(crate) fn pod(&self, number: u8) -> Pod {
        let netns = Namespace::new(&format!("tpt-{}-pod{number}", self.name));
        let plan = PodPlan {
            pod: PodKey {
                namespace: "shop".into(),
                name: format!("pod-{number}"),
            },
            container_id: format!("container{number}"),
            netns: netns.path(),
            ifname: "eth0".into(),
            addresses: vec![pod4(number).into(), pod6(number).into()],
            mtu: 1500,
            table: number.is_multiple_of(2).then_some(2),
            node: vec![NODE.into(), NODE6.into()],
            capture: None,
            policy: PodPolicy::default(),
        };
        Pod { netns, plan }
    }
}

/// Threads that serve until the process ends may still hold a namespace; its name goes with the test.
impl Drop for World {
    fn drop(&mut self) {
        discard(&self.node.path());
        discard(&self.outside.path());
    }
}

pub(crate) struct Pod {
    pub(crate) netns: Namespace,
    pub(crate) plan: PodPlan,
}

impl Pod {
    pub(crate) fn apply(&self, world: &World, datapath: &Datapath) -> Applied {
        world
            .wait(datapath.apply(&self.plan))
            .unwrap_or_else(|error| panic!("{error}"))
    }
}

pub(crate) fn pod4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 1, number)
}

pub(crate) fn pod6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, u16::from(number))
}

/// A pair of links between two namespaces, both up.
fn connect(one: &Namespace, end: &str, mac: Mac, other: &Namespace, peer: &str) {
    let there = File::open(other.path()).unwrap();
    let (end, peer) = (end.to_owned(), peer.to_owned());
    let inner = peer.clone();
    one.configure(move |handle| async move {
        use std::os::fd::AsRawFd as _;
        let pair = LinkVeth::new(&end, &inner).address(mac.0.to_vec()).build();
        handle.link().add(pair).execute().await?;
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(inner)
            .setns_by_fd(there.as_raw_fd());
        handle.link().set(peer.build()).execute().await?;
        let end = LinkMessageBuilder::<LinkUnspec>::new().name(end).up();
        handle.link().set(end.build()).execute().await
    });
    other.configure(move |handle| async move {
        let up = LinkMessageBuilder::<LinkUnspec>::new().name(peer).up();
        handle.link().set(up.build()).execute().await
    });
}

async fn node_side(handle: rtnetlink::Handle) -> Result<(), rtnetlink::Error> {
    let eth0 = index(&handle, "eth0").await?;
    add_address(&handle, eth0, NODE.into(), 24).await?;
    add_address(&handle, eth0, NODE6.into(), 64).await?;
    let default = RouteMessageBuilder::<Ipv4Addr>::new().gateway([10, 0, 1, 1].into());
    handle.route().add(default.build()).execute().await?;
    let default = RouteMessageBuilder::<Ipv6Addr>::new().gateway("fd00:1::1".parse().unwrap());
    handle.route().add(default.build()).execute().await
}

async fn outside_side(handle: rtnetlink::Handle) -> Result<(), rtnetlink::Error> {
    let (e0, e1) = (index(&handle, "e0").await?, index(&handle, "e1").await?);
    for address in [
        "203.0.113.66",
        "169.254.169.254",
        "2001:db8::66",
        "fd00:ec2::254",
    ] {
        let address: IpAddr = address.parse().unwrap();
        add_address(
            &handle,
            1,
            address,
            if address.is_ipv4() { 32 } else { 128 },
        )
        .await?;
    }
    for link in [e0, e1] {
        add_address(&handle, link, [10, 0, 1, 1].into(), 32).await?;
        add_address(&handle, link, "fe80::1".parse().unwrap(), 64).await?;
    }
    add_address(&handle, e0, "fd00:1::1".parse().unwrap(), 128).await?;
    // As EC2 does: each address by the ENI that owns it.
    for number in 2..=30u8 {
        let on_secondary = number % 2 == 0 && number != 10 || number == 11;
        let (link, mac) = if on_secondary {
            (e1, SECONDARY_MAC)
        } else {
            (e0, PRIMARY_MAC)
        };
        let address6 = pod6(number);
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(pod4(number), 32);
        handle
            .route()
            .add(route.output_interface(link).build())
            .execute()
            .await?;
        let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address6, 128);
        handle
            .route()
            .add(route.output_interface(link).build())
            .execute()
            .await?;
        for address in [IpAddr::V4(pod4(number)), address6.into()] {
            let neighbour = handle.neighbours().add(link, address);
            neighbour
                .link_layer_address(&mac.0)
                .replace()
                .execute()
                .await?;
        }
    }
    Ok(())
}

async fn add_address(
    handle: &rtnetlink::Handle,
    index: u32,
    address: IpAddr,
    length: u8,
) -> Result<(), rtnetlink::Error> {
    use netlink_packet_route::address::AddressHeaderFlags;
    let mut request = handle.address().add(index, address, length);
    request.message_mut().header.flags = AddressHeaderFlags::Nodad;
    request.execute().await
}

async fn index(handle: &rtnetlink::Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    Ok(found.try_next().await?.map_or(0, |link| link.header.index))
}

/// Everything that a test might leave behind in a namespace, as text to compare.
pub(crate) fn state(namespace: &Namespace) -> String {
    namespace.run(|| {
        let mut text = String::new();
        for arguments in [
            ["-br", "link"].as_slice(),
            &["-br", "addr"],
            &["-4", "route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
            &["-4", "rule"],
            &["-6", "rule"],
            &["neigh", "show", "nud", "permanent"],
        ] {
            let output = std::process::Command::new("ip").args(arguments).output();
            // A link that was just raised is in no known state for an instant.
            text += &String::from_utf8(output.unwrap().stdout)
                .unwrap()
                .replace("UNKNOWN", "UP     ");
        }
        let rules = std::process::Command::new("nft")
            .args(["-s", "list", "ruleset"])
            .output();
        text + &String::from_utf8(rules.unwrap().stdout).unwrap()
    })
}
