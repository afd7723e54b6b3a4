//! The VPC's resolver: names of the pretended internet, of the instances, and those that the zone
//! file gives; whatever else is asked does not exist.
//!
//! The zone file is JSON, name to addresses, and is read again when it changes:
//! `{"web.shop.svc.cluster.local": ["10.0.3.7"]}`.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use hickory_proto::{
    op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{
            A, AAAA, HTTPS, SOA, SVCB,
            svcb::{Alpn, IpHint, SvcParamKey, SvcParamValue},
        },
    },
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
};

use crate::{
    internet::Log,
    spec::{Host, Role, Spec},
};

const TTL: u32 = 60;
/// UDP answers above this are cut and asked for again over TCP.
const UDP_SIZE: u16 = 1232;
const CONNECTIONS: usize = 128;
const PATIENCE: Duration = Duration::from_secs(10);

/// Names and their addresses, as in the zone file.
pub type Names = BTreeMap<String, Vec<IpAddr>>;

/// Replaces the zone file in one step, so that no reader sees half of it.
pub fn write_zone(path: &Path, names: &Names) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(names)?;
    text.push(b'\n');
    let fresh = path.with_extension("new");
    fs::write(&fresh, text)?;
    fs::rename(fresh, path)
}

/// Answers queries; shared by UDP and TCP, and by the attacker's own name server.
#[derive(Debug)]
pub(crate) struct Resolver {
    hosts: Vec<Host>,
    region: String,
    zone_file: PathBuf,
    zone: Mutex<Zone>,
    log: Arc<Log>,
}

#[derive(Debug, Default)]
struct Zone {
    read: Option<(SystemTime, u64)>,
    names: Names,
}

impl Resolver {
    pub(crate) fn new(spec: &Spec, zone_file: PathBuf, log: Arc<Log>) -> Self {
        let (hosts, region) = (spec.hosts().to_vec(), spec.region().to_owned());
        Self {
            hosts,
            region,
            zone_file,
            zone: Mutex::default(),
            log,
        }
    }

    pub(crate) async fn serve_udp(self: Arc<Self>, socket: UdpSocket) {
        let mut buffer = vec![0; 4096];
        loop {
            match socket.recv_from(&mut buffer).await {
                Ok((length, peer)) => {
                    if let Some(answer) = self.answer(&buffer[..length], peer, true)
                        && let Err(error) = socket.send_to(&answer, peer).await
                    {
                        tracing::debug!(%peer, %error, "an answer was not sent");
                    }
                }
                Err(error) => {
                    // ICMP of an earlier answer; the socket goes on.
                    tracing::debug!(%error, "receiving queries");
                }
            }
        }
    }

    pub(crate) async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let Ok((stream, peer)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            while connections.try_join_next().is_some() {}
            let resolver = Arc::clone(&self);
            connections.spawn(async move {
                let _place = place;
                // A peer that is slow or talks nonsense is let go.
                let _ = resolver.converse(stream, peer).await;
            });
        }
    }

    async fn converse(&self, mut stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        loop {
            let length = tokio::time::timeout(PATIENCE, stream.read_u16()).await??;
            let mut query = vec![0; length.into()];
            tokio::time::timeout(PATIENCE, stream.read_exact(&mut query)).await??;
            let Some(answer) = self.answer(&query, peer, false) else {
                return Ok(());
            };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            stream
                .write_all(&[&length.to_be_bytes(), &answer[..]].concat())
                .await?;
        }
    }

    /// The answer to a query, none to what is none.
    pub(crate) fn answer(&self, bytes: &[u8], peer: SocketAddr, udp: bool) -> Option<Vec<u8>> {
        let query = Message::from_vec(bytes).ok()?;
        if query.metadata.message_type != MessageType::Query {
            return None;
        }
        let mut response = Message::response(query.metadata.id, query.metadata.op_code);
        response.metadata = Metadata::response_from_request(&query.metadata);
        response.metadata.recursion_available = true;
        if query.metadata.op_code != OpCode::Query {
            response.metadata.response_code = ResponseCode::NotImp;
        } else if let [question] = &query.queries[..] {
            response.add_query(question.clone());
            self.resolve(question, peer, &mut response);
        } else {
            response.metadata.response_code = ResponseCode::FormErr;
        }
        let mut room = 512;
        if let Some(edns) = &query.edns {
            room = edns.max_payload().clamp(512, UDP_SIZE);
            let mut own = Edns::new();
            own.set_max_payload(UDP_SIZE);
            response.set_edns(own);
        }
        let whole = response.to_vec().ok()?;
        if udp && whole.len() > usize::from(room) {
            return response.truncate().to_vec().ok();
        }
        Some(whole)
    }

    fn resolve(&self, question: &Query, peer: SocketAddr, response: &mut Message) {
        let name = question.name().to_lowercase();
        let text = name.to_ascii().trim_end_matches('.').to_owned();
        if let Some(host) = self.attacker_of(&text) {
            // A recursive resolver would carry the question to the attacker's name server.
            self.log
                .question(&host.name, peer, &text, question.query_type());
        }
        let Some(found) = self.find(&text) else {
            response.metadata.response_code = ResponseCode::NXDomain;
            response.add_authority(authority(&name));
            return;
        };
        let addresses = found.addresses.iter();
        let data: Vec<RData> = match question.query_type() {
            RecordType::A => addresses
                .filter_map(|a| Some(RData::A(A(v4(a)?))))
                .collect(),
            RecordType::AAAA => addresses
                .filter_map(|a| Some(RData::AAAA(AAAA(v6(a)?))))
                .collect(),
            RecordType::HTTPS if found.https => vec![https(&found.addresses)],
            _ => Vec::new(),
        };
        if data.is_empty() {
            response.add_authority(authority(&name));
        }
        let owner = question.name().clone();
        response.add_answers(
            data.into_iter()
                .map(|d| Record::from_rdata(owner.clone(), TTL, d)),
        );
    }

    fn find(&self, name: &str) -> Option<Found> {
        if let Some(addresses) = self.zone_name(name) {
            return Some(Found {
                addresses,
                https: false,
            });
        }
        for host in &self.hosts {
            if let Some(addresses) = host.aliases.get(name) {
                return Some(Found {
                    addresses: addresses.clone(),
                    https: false,
                });
            }
        }
        let own = self.hosts.iter().find(|host| host.name == name);
        let host = own.or_else(|| self.attacker_of(name))?;
        let addresses = [Some(host.v4.into()), host.v6.map(IpAddr::V6)];
        let addresses = addresses.into_iter().flatten().collect();
        Some(Found {
            addresses,
            https: host.https_record,
        })
    }

    /// The attacker's host whose name this is or is below.
    fn attacker_of(&self, name: &str) -> Option<&Host> {
        let mut attackers = self.hosts.iter().filter(|host| host.role == Role::Attacker);
        attackers.find(|host| {
            name.strip_suffix(&host.name)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        })
    }

    fn zone_name(&self, name: &str) -> Option<Vec<IpAddr>> {
        let suffix = format!(".{}.compute.internal", self.region);
        if let Some(dashed) = name
            .strip_prefix("ip-")
            .and_then(|rest| rest.strip_suffix(&suffix))
        {
            return dashed
                .replace('-', ".")
                .parse::<Ipv4Addr>()
                .ok()
                .map(|v4| vec![v4.into()]);
        }
        let mut zone = self.zone.lock();
        let stamp = fs::metadata(&self.zone_file).ok().and_then(|file| {
            Some((
                file.modified().ok()?,
                std::os::unix::fs::MetadataExt::ino(&file),
            ))
        });
        if stamp != zone.read {
            match read_zone(&self.zone_file) {
                Ok(names) => zone.names = names,
                // The names known before stay.
                Err(error) => tracing::warn!(file = %self.zone_file.display(), %error, "zone file"),
            }
            zone.read = stamp;
        }
        zone.names.get(name).cloned()
    }
}

struct Found {
    addresses: Vec<IpAddr>,
    https: bool,
}

fn read_zone(path: &Path) -> io::Result<Names> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Names::new()),
        Err(error) => return Err(error),
    };
    let names: Names = serde_json::from_slice(&text)?;
    let normal = |name: String| name.to_ascii_lowercase().trim_end_matches('.').to_owned();
    Ok(names
        .into_iter()
        .map(|(name, addresses)| (normal(name), addresses))
        .collect())
}

fn v4(address: &IpAddr) -> Option<Ipv4Addr> {
    match address {
        IpAddr::V4(v4) => Some(*v4),
        IpAddr::V6(_) => None,
    }
}

fn v6(address: &IpAddr) -> Option<std::net::Ipv6Addr> {
    match address {
        IpAddr::V4(_) => None,
        IpAddr::V6(v6) => Some(*v6),
    }
}

/// With hints, and with an ECH config of random bytes: what a resolver has to take out.
fn https(addresses: &[IpAddr]) -> RData {
    let hints = IpHint(addresses.iter().filter_map(|a| Some(A(v4(a)?))).collect());
    let ech = hickory_proto::rr::rdata::svcb::EchConfigList(vec![0xfe, 0x0d, 0, 4, 1, 2, 3, 4]);
    let params = vec![
        (
            SvcParamKey::Alpn,
            SvcParamValue::Alpn(Alpn(vec!["h2".into()])),
        ),
        (SvcParamKey::Ipv4Hint, SvcParamValue::Ipv4Hint(hints)),
        (
            SvcParamKey::EchConfigList,
            SvcParamValue::EchConfigList(ech),
        ),
    ];
    RData::HTTPS(HTTPS(SVCB::new(1, Name::root(), params)))
}

fn authority(name: &Name) -> Record {
    let zone = name.base_name();
    let soa = SOA::new(zone.clone(), zone.clone(), 1, 3600, 600, 86_400, 5);
    Record::from_rdata(zone, 5, RData::SOA(soa))
}
