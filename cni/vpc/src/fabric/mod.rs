//! The network behind the API: a router namespace that carries what EC2 has assigned, and nothing
//! else.
//!
//! An interface is a veth pair: `eniN` in the router, `ethN` in the instance's namespace. The
//! router has a route and a neighbour entry for each assigned address, answers for neighbours in
//! the subnet by proxy ARP, and drops what EC2 does not know ([`rules`]). Towards the pretended
//! internet there is one link with NAT. [`Fabric::apply`] brings the ports in line with
//! [`World::ports`](crate::world::World::ports); [`isolation`] proves that no way leads outside.

pub mod isolation;
mod links;
pub(crate) mod rules;
mod uplink;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::atomic::{AtomicU32, Ordering},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tokio::task;

use self::{
    links::{Links, Peer, Via},
    rules::PORT,
};
use crate::{
    netns::{self, Namespace},
    spec::Spec,
    world::{InterfaceId, Port},
};

/// As EC2's within a VPC.
const VPC_MTU: u32 = 9001;
/// The router on every link, for IPv6.
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    #[error("{action}: {source}")]
    Netlink {
        action: String,
        source: rtnetlink::Error,
    },
    #[error("link `{0}` does not exist")]
    NoLink(String),
    #[error("nft refused the rules of `{namespace}`: {said}in\n{script}")]
    Rules {
        namespace: String,
        said: String,
        script: String,
    },
    #[error("the box is not sealed: {0}")]
    NotIsolated(String),
    #[error("a worker thread of the fabric failed: {0}")]
    Worker(#[from] task::JoinError),
}

impl Error {
    /// The kernel says that what was to be deleted is not there.
    fn is_absence(&self) -> bool {
        [libc::ESRCH, libc::ENOENT, libc::ENODEV]
            .into_iter()
            .any(|number| self.is(number))
    }

    fn is(&self, number: i32) -> bool {
        let Self::Netlink {
            source: rtnetlink::Error::NetlinkError(error),
            ..
        } = self
        else {
            return false;
        };
        error.raw_code().abs() == number
    }
}

fn netlink(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |source| Error::Netlink {
        action: action.into(),
        source,
    }
}

/// The namespaces of a box.
#[derive(Clone, Debug)]
pub struct Namespaces {
    pub router: Namespace,
    pub internet: Namespace,
    pub instances: BTreeMap<String, Namespace>,
}

impl Namespaces {
    /// Their names, whether or not they exist.
    pub fn named(name: &str, spec: &Spec) -> Result<Self, netns::Error> {
        let of = |part: &str| Namespace::handle(&format!("{name}-{part}"));
        let instances = spec.instances().iter();
        Ok(Self {
            router: of("router")?,
            internet: of("internet")?,
            instances: instances
                .map(|instance| Ok((instance.name.clone(), of(&instance.name)?)))
                .collect::<Result<_, netns::Error>>()?,
        })
    }

    pub fn all(&self) -> impl Iterator<Item = &Namespace> {
        [&self.router, &self.internet]
            .into_iter()
            .chain(self.instances.values())
    }
}

#[derive(Debug)]
pub struct Fabric {
    spec: Spec,
    namespaces: Namespaces,
    links: Links,
    plugged: BTreeMap<InterfaceId, Plugged>,
    next_link: AtomicU32,
}

#[derive(Debug)]
struct Plugged {
    link: String,
    index: u32,
    port: Port,
}

impl Fabric {
    /// Makes the namespaces, the router's rules and the way to the internet; no ports yet.
    pub async fn build(spec: &Spec, namespaces: Namespaces) -> Result<Self, Error> {
        let made = namespaces.clone();
        let instances = spec.instances().to_vec();
        let base = rules::base(spec);
        blocking(move || {
            for namespace in made.all() {
                Namespace::create(namespace.name())?;
                uplink::quiet(namespace)?;
            }
            for instance in instances.iter().filter(|instance| instance.forwarding) {
                if let Some(namespace) = made.instances.get(&instance.name) {
                    namespace.set_forwarding(true)?;
                }
            }
            made.router.set_forwarding(true)?;
            rules::load(&made.router, &base)
        })
        .await?;
        let fabric = Self {
            spec: spec.clone(),
            links: Links::open(&namespaces.router)?,
            namespaces,
            plugged: BTreeMap::new(),
            next_link: AtomicU32::new(1),
        };
        uplink::join(spec, &fabric.namespaces, &fabric.links).await?;
        Ok(fabric)
    }

    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }

    /// Plugs, unplugs and re-addresses until the ports are as wanted. After an error the ports
    /// named before it are done, and a further call goes on with the rest.
    pub async fn apply(&mut self, wanted: &BTreeMap<InterfaceId, Port>) -> Result<(), Error> {
        let same_device = |plugged: &Plugged, port: &Port| {
            let (a, b) = (&plugged.port, port);
            (&a.instance, a.device, a.mac) == (&b.instance, b.device, b.mac)
        };
        let stays = |id: &InterfaceId, plugged: &Plugged| {
            wanted
                .get(id)
                .is_some_and(|port| same_device(plugged, port))
        };
        let gone = self
            .plugged
            .iter()
            .filter(|(id, plugged)| !stays(id, plugged));
        for id in gone.map(|(id, _)| id.clone()).collect::<Vec<_>>() {
            self.unplug(&id).await?;
        }
        let mut script = String::new();
        let mut changed = Vec::new();
        for (id, plugged) in &self.plugged {
            let Some(port) = wanted.get(id).filter(|port| **port != plugged.port) else {
                continue;
            };
            let judged = |port: &Port| (port.groups.clone(), port.source_check);
            if judged(&plugged.port) == judged(port) {
                readdress(&mut script, plugged, port);
            } else {
                rules::close(&mut script, &plugged.link, &plugged.port);
                rules::open(
                    &mut script,
                    &plugged.link,
                    port,
                    self.spec.security_groups(),
                );
            }
            changed.push((id.clone(), port.clone()));
        }
        self.load(script).await?;
        // Away before anew, so that an address that moves is never routed nowhere.
        for (id, port) in &changed {
            if let Some(plugged) = self.plugged.get(id) {
                self.delete_routes(plugged.index, &plugged.port, port)
                    .await?;
            }
        }
        for (id, port) in changed {
            if let Some(plugged) = self.plugged.get(&id) {
                self.add_routes(plugged.index, &port, &plugged.port).await?;
            }
            if let Some(plugged) = self.plugged.get_mut(&id) {
                plugged.port = port;
            }
        }
        for (id, port) in wanted {
            if !self.plugged.contains_key(id) {
                self.plug(id, port).await?;
            }
        }
        Ok(())
    }

    /// As a freshly booted machine would have its first interface: up, addressed, routed.
    pub async fn boot(&self, port: &Port) -> Result<(), Error> {
        let (Some(namespace), Some(subnet)) = (
            self.namespaces.instances.get(&port.instance),
            self.spec
                .subnets()
                .iter()
                .find(|subnet| subnet.id == port.subnet),
        ) else {
            return Ok(());
        };
        let links = Links::open(namespace)?;
        let eth0 = links.index("eth0").await?;
        let length = subnet.cidr.prefix_len();
        let address = Ipv4Net::new_assert(port.primary, length);
        links.add_address(eth0, address.into()).await?;
        let gateway = gateway(subnet.cidr).into();
        links
            .add_route(anywhere4(), Via::Neighbour(eth0, gateway))
            .await?;
        if let Some(net) = port.ipv6.iter().find(|net| net.prefix_len() == 128) {
            links.add_address(eth0, (*net).into()).await?;
            links
                .add_route(anywhere6(), Via::Neighbour(eth0, ROUTER6.into()))
                .await?;
        }
        Ok(())
    }

    async fn plug(&mut self, id: &InterfaceId, port: &Port) -> Result<(), Error> {
        let Some(namespace) = self.namespaces.instances.get(&port.instance) else {
            return Ok(());
        };
        let link = format!("{PORT}{}", self.next_link.fetch_add(1, Ordering::Relaxed));
        let peer = |link: String| Peer {
            namespace,
            link,
            mac: Some(port.mac),
            up: port.device == 0,
        };
        let own = peer(format!("eth{}", port.device));
        let index = match self.links.add_veth(&link, VPC_MTU, own).await {
            // The guest has given the name to something else: it gets the next free one.
            Err(error) if error.is(libc::EEXIST) => {
                self.links
                    .add_veth(&link, VPC_MTU, peer("eth%d".into()))
                    .await?
            }
            other => other?,
        };
        if let Err(error) = self.wire(&link, index, port).await {
            self.links.delete(&link).await?;
            return Err(error);
        }
        self.plugged.insert(
            id.clone(),
            Plugged {
                link,
                index,
                port: port.clone(),
            },
        );
        Ok(())
    }

    /// All that a link needs; the rules come last, and until they are there nothing passes.
    async fn wire(&self, link: &str, index: u32, port: &Port) -> Result<(), Error> {
        let (router, name) = (self.namespaces.router.clone(), link.to_owned());
        blocking(move || {
            // proxy_delay: an answer on behalf of a neighbour comes at once, as the fabric's does.
            router.sysctl(&format!("ipv4/neigh/{name}/proxy_delay"), "0")?;
            router.sysctl(&format!("ipv4/conf/{name}/proxy_arp"), "1")?;
            Ok(())
        })
        .await?;
        if let Some(subnet) = self
            .spec
            .subnets()
            .iter()
            .find(|subnet| subnet.id == port.subnet)
        {
            let address = Ipv4Net::from(gateway(subnet.cidr));
            self.links.add_address(index, address.into()).await?;
        }
        self.links
            .add_address(index, Ipv6Net::new_assert(ROUTER6, 64).into())
            .await?;
        self.links
            .add_neighbour(index, port.primary.into(), port.mac)
            .await?;
        if let Some(first) = first6(port) {
            self.links
                .add_neighbour(index, first.into(), port.mac)
                .await?;
        }
        let nothing = Port {
            addresses: BTreeSet::new(),
            ipv6: BTreeSet::new(),
            ..port.clone()
        };
        self.add_routes(index, port, &nothing).await?;
        if port.device == 0 {
            self.boot(port).await?;
        }
        let mut script = String::new();
        rules::open(&mut script, link, port, self.spec.security_groups());
        self.load(script).await
    }

    async fn unplug(&mut self, id: &InterfaceId) -> Result<(), Error> {
        let Some(plugged) = self.plugged.get(id) else {
            return Ok(());
        };
        let mut script = String::new();
        rules::close(&mut script, &plugged.link, &plugged.port);
        self.load(script).await?;
        // Its routes go with it.
        self.links.delete(&plugged.link).await?;
        self.plugged.remove(id);
        Ok(())
    }

    /// Adds the routes that a port has and another lacks.
    async fn add_routes(&self, link: u32, port: &Port, lacks: &Port) -> Result<(), Error> {
        for (to, next) in routes(port, lacks) {
            let via = next.map_or(Via::Link(link), |next| Via::Neighbour(link, next));
            self.links.add_route(to, via).await?;
        }
        Ok(())
    }

    async fn delete_routes(&self, link: u32, port: &Port, keeps: &Port) -> Result<(), Error> {
        for (to, next) in routes(port, keeps) {
            let via = next.map_or(Via::Link(link), |next| Via::Neighbour(link, next));
            self.links.delete_route(to, via).await?;
        }
        Ok(())
    }

    async fn load(&self, script: String) -> Result<(), Error> {
        if script.is_empty() {
            return Ok(());
        }
        let router = self.namespaces.router.clone();
        blocking(move || rules::load(&router, &script)).await
    }
}

/// Where to each address of `port` that `other` has not: over the link for the primary ones, which
/// come first, and through those for the rest.
fn routes(port: &Port, other: &Port) -> Vec<(IpNet, Option<IpAddr>)> {
    let primaries = [Some(IpAddr::V4(port.primary)), first6(port).map(IpAddr::V6)];
    let v4 = rules::missing(&port.addresses, &other.addresses);
    let v6 = rules::missing(&port.ipv6, &other.ipv6);
    let all = v4
        .into_iter()
        .map(|address| IpNet::from(Ipv4Net::from(address)));
    let mut routes: Vec<_> = all
        .chain(v6.into_iter().map(IpNet::from))
        .map(|to| {
            let next = primaries
                .into_iter()
                .flatten()
                .find(|next| next.is_ipv4() == to.addr().is_ipv4());
            (to, next.filter(|next| *next != to.addr()))
        })
        .collect();
    routes.sort_by_key(|(_, next)| next.is_some());
    routes
}

fn readdress(script: &mut String, plugged: &Plugged, port: &Port) {
    let (old, link) = (&plugged.port, plugged.link.as_str());
    let gone = (
        rules::missing(&old.addresses, &port.addresses),
        rules::missing(&old.ipv6, &port.ipv6),
    );
    let new = (
        rules::missing(&port.addresses, &old.addresses),
        rules::missing(&port.ipv6, &old.ipv6),
    );
    rules::owned(script, "delete", link, &gone.0, &gone.1);
    rules::owned(script, "add", link, &new.0, &new.1);
}

async fn blocking<F>(work: F) -> Result<(), Error>
where
    F: FnOnce() -> Result<(), Error> + Send + 'static,
{
    task::spawn_blocking(work).await?
}

fn first6(port: &Port) -> Option<Ipv6Addr> {
    port.ipv6
        .iter()
        .find(|net| net.prefix_len() == 128)
        .map(Ipv6Net::addr)
}

/// A subnet's router: its first address.
pub(crate) fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()) + 1)
}

fn anywhere4() -> IpNet {
    Ipv4Net::default().into()
}

fn anywhere6() -> IpNet {
    Ipv6Net::default().into()
}
