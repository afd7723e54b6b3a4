//! How the data plane is set up; everything else comes from the mesh.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use crate::capture::OriginalDestination;

/// The ports of the proxy itself: admin, outbound, inbound, metrics, readiness.
pub const OWN_PORTS: [u16; 5] = [15000, 15001, 15006, 15020, 15021];

#[derive(Clone, Debug)]
pub struct Config {
    pub outbound: Listen,
    pub inbound: Listen,
    /// The pod's own addresses, for the loop guard. Empty: loopback alone.
    pub pod_addresses: Vec<IpAddr>,
    /// Threads that carry traffic; at least one.
    pub workers: usize,
    pub bounds: Bounds,
}

/// One captured direction.
#[derive(Clone, Debug)]
pub struct Listen {
    /// An IPv6 address is skipped where the machine has no IPv6.
    pub addresses: Vec<SocketAddr>,
    pub original: OriginalDestination,
}

/// What a hostile or broken peer can take, at most.
#[derive(Clone, Debug)]
pub struct Bounds {
    /// Captured connections at once. Past it, the kernel's accept queue holds new ones.
    pub connections: u32,
    /// For the whole of a request head, a ClientHello or a TLS handshake.
    pub head: Duration,
    /// How long a client may stay silent before its protocol is taken to be server-first.
    pub silence: Duration,
    /// Decoded size of a request or response head.
    pub head_bytes: usize,
    pub headers: usize,
    pub streams: u32,
    /// HTTP connections without a request.
    pub idle: Duration,
    /// Request bodies that can be sent again.
    pub replay_bytes: usize,
    /// Upstream connections are not used past this age, so that new endpoints get their share.
    pub connection_age: Duration,
    /// Idle pooled connections to other pods; less than `idle`, so that the far side's proxy does
    /// not close first.
    pub pool_idle: Duration,
    /// Idle pooled connections to the application. Servers close after as little as five seconds
    /// (Node.js); reconnecting within the pod costs little.
    pub app_pool_idle: Duration,
}

impl Default for Config {
    /// As in a pod.
    fn default() -> Self {
        let any = |port| {
            vec![
                SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
                SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
            ]
        };
        let listen = |port| Listen {
            addresses: any(port),
            original: OriginalDestination::Kernel,
        };
        Self {
            outbound: listen(15001),
            inbound: listen(15006),
            pod_addresses: Vec::new(),
            workers: 1,
            bounds: Bounds::default(),
        }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 16_384,
            head: Duration::from_secs(10),
            silence: Duration::from_millis(100),
            head_bytes: 64 * 1024,
            headers: 128,
            streams: 256,
            idle: Duration::from_secs(900),
            replay_bytes: 64 * 1024,
            connection_age: Duration::from_secs(600),
            pool_idle: Duration::from_secs(90),
            app_pool_idle: Duration::from_secs(4),
        }
    }
}
