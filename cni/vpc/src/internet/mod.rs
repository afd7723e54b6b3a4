//! The pretended internet: every address beyond the VPC ends here, and whatever arrives is
//! written down.
//!
//! Ports 80 and 443 of every address are HTTP and HTTPS ([`web`]) with certificates of a test root
//! ([`certificates`]); everything else goes to a sink ([`sink`]) that takes TCP, UDP and ICMP on
//! any port of any address. [`log`] is the tests' oracle: what is not in it did not leave.

mod certificates;
mod log;
mod sink;
mod web;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

pub use self::log::{Event, Record};
pub(crate) use self::{certificates::Root, log::Log};
use crate::{
    fabric::{self, rules},
    netns::{self, Namespace},
    resolver::Resolver,
    spec::{Role, Spec},
};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Namespace(#[from] netns::Error),
    #[error(transparent)]
    Fabric(#[from] fabric::Error),
    #[error("opening sockets of the pretended internet: {0}")]
    Socket(#[from] io::Error),
    #[error("making certificates: {0}")]
    Certificate(#[from] rcgen::Error),
    #[error("using certificates: {0}")]
    Tls(#[from] rustls::Error),
}

/// Who an address belongs to.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    hosts: Arc<BTreeMap<IpAddr, String>>,
}

impl Directory {
    pub(crate) fn new(spec: &Spec) -> Self {
        let addressed = spec.hosts().iter().flat_map(|host| {
            let addresses = [Some(IpAddr::V4(host.v4)), host.v6.map(IpAddr::V6)];
            addresses
                .into_iter()
                .flatten()
                .map(|address| (address, host.name.clone()))
        });
        Self {
            hosts: Arc::new(addressed.collect()),
        }
    }

    /// A host's name; an address that no host has is its own.
    pub(crate) fn name(&self, address: IpAddr) -> String {
        self.hosts
            .get(&address)
            .cloned()
            .unwrap_or_else(|| address.to_string())
    }
}

/// Starts everything that answers; it ends with the set.
pub(crate) fn start(
    spec: &Spec,
    namespace: &Namespace,
    root: &Root,
    log: &Arc<Log>,
    resolver: &Arc<Resolver>,
    tasks: &mut JoinSet<()>,
) -> Result<(), Error> {
    rules::load(namespace, &sink_rules(spec))?;
    let directory = Directory::new(spec);
    let certificates = Arc::new(certificates::Certificates::new(root, spec)?);
    for family in [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ] {
        let plain = listen(namespace, SocketAddr::new(family, 80))?;
        tasks.spawn(web::serve(plain, None, directory.clone(), Arc::clone(log)));
        let tls = listen(namespace, SocketAddr::new(family, 443))?;
        let certificates = Some(Arc::clone(&certificates));
        tasks.spawn(web::serve(
            tls,
            certificates,
            directory.clone(),
            Arc::clone(log),
        ));
        sink::start(namespace, family, &directory, log, tasks)?;
    }
    for host in spec
        .hosts()
        .iter()
        .filter(|host| host.role == Role::Attacker)
    {
        let addresses = [Some(IpAddr::V4(host.v4)), host.v6.map(IpAddr::V6)];
        for address in addresses
            .into_iter()
            .flatten()
            .map(|ip| SocketAddr::new(ip, 53))
        {
            let socket = bind_udp(namespace, address)?;
            tasks.spawn(Arc::clone(resolver).serve_udp(socket));
        }
    }
    Ok(())
}

/// All that no server listens for is handed to the sink with its destination kept.
fn sink_rules(spec: &Spec) -> String {
    let attackers = spec
        .hosts()
        .iter()
        .filter(|host| host.role == Role::Attacker);
    let name_servers: String = attackers
        .map(|host| {
            let v6 = host
                .v6
                .map(|v6| format!("    ip6 daddr {v6} udp dport 53 accept\n"));
            format!(
                "    ip daddr {} udp dport 53 accept\n{}",
                host.v4,
                v6.unwrap_or_default()
            )
        })
        .collect();
    let port = sink::PORT;
    format!(
        "table inet sink {{\n  counter arrived {{ }}\n  counter other {{ }}\n  chain prerouting {{\n    \
         type filter hook prerouting priority mangle; policy accept;\n    \
         iifname != \"eth0\" accept\n    counter name arrived\n    \
         tcp dport {{ 80, 443 }} accept\n{name_servers}    \
         meta nfproto ipv4 meta l4proto {{ tcp, udp }} tproxy ip to :{port} accept\n    \
         meta nfproto ipv6 meta l4proto {{ tcp, udp }} tproxy ip6 to :{port} accept\n    \
         meta l4proto {{ icmp, ipv6-icmp }} accept\n    counter name other\n  }}\n}}\n"
    )
}

fn listen(namespace: &Namespace, address: SocketAddr) -> Result<TcpListener, Error> {
    let socket = namespace.run(|| transparent(address, Type::STREAM))??;
    socket.listen(1024)?;
    Ok(TcpListener::from_std(socket.into())?)
}

fn bind_udp(namespace: &Namespace, address: SocketAddr) -> Result<UdpSocket, Error> {
    let socket = namespace.run(|| transparent(address, Type::DGRAM))??;
    Ok(UdpSocket::from_std(socket.into())?)
}

/// A socket that takes and answers for addresses that no link has: all of the internet's.
fn transparent(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
