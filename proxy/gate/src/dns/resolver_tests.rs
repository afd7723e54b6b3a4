use std::time::SystemTime;

use hickory_proto::op::{Message, OpCode};
use tokio::net::UdpSocket;
use turnpike_certs::{Authority, CredentialStore, KeyRequest, LEAF_LIFETIME, TrustBundle};
use turnpike_rules::egress::{EgressPolicy, Mode};

use super::*;
use crate::{
    spool::{SpoolConfig, Writer},
    state::{Change, Owner, PodInfo, PodLimits},
};

const POD: &str = "10.0.1.5";

/// A pod with a policy of each mode, none of which allows anything.
fn pod(modes: &[Mode]) -> (Arc<Owner>, State) {
    let (owner, state) = Owner::new(PodLimits::default());
    owner.apply(Change::PodAdded(PodInfo {
        uid: "u1".into(),
        namespace: "shop".into(),
        name: "pay-0".into(),
        container_id: "c1".into(),
        addresses: vec![POD.parse().unwrap()],
        selected: true,
    }));
    let policies = modes.iter().enumerate().map(|(i, mode)| EgressPolicy {
        name: format!("shop/{i}").into(),
        version: "1".into(),
        mode: *mode,
        rules: vec![],
    });
    let added = vec![PodEgress {
        uid: "u1".into(),
        namespace: "shop".into(),
        name: "pay-0".into(),
        identity: "spiffe://cluster.local/ns/shop/sa/pay".parse().unwrap(),
        policies: policies.collect(),
    }];
    let removed = vec![];
    owner.apply(Change::Policies { added, removed });
    (owner, state)
}

async fn spool(dir: &tempfile::TempDir) -> (Writer, Spool) {
    let now = SystemTime::now();
    let authority = Authority::generate("cluster.local", 10 * LEAF_LIFETIME, now).unwrap();
    let roots = TrustBundle::from_pem(authority.certificate_pem().as_bytes()).unwrap();
    let signer = "spiffe://cluster.local/ns/turnpike-system/sa/turnpike-gate";
    let signer = signer.parse().unwrap();
    let request = KeyRequest::new(&signer).unwrap();
    let issued = authority.sign(request.csr_pem(), &signer, LEAF_LIFETIME, now);
    let credentials = request.into_credentials(&issued.unwrap().chain, roots);
    let config = SpoolConfig::new(dir.path(), "node-a");
    let credentials = CredentialStore::new(credentials.unwrap());
    Writer::open(config, credentials, Arc::default())
        .await
        .unwrap()
}

/// A server that knows every name, and no address of any.
async fn server() -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let at = socket.local_addr().unwrap();
    let serving = async move {
        let mut buffer = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            answer.add_query(query.queries[0].clone());
            let _ = socket.send_to(&answer.to_vec().unwrap(), peer).await;
        }
    };
    (at, tokio::spawn(serving))
}

#[tokio::test]
async fn what_is_refused_is_asked_all_the_same_only_where_all_policies_audit() {
    let (upstream, serving) = server().await;
    let dir = tempfile::tempdir().unwrap();
    let (_writer, spool) = spool(&dir).await;
    for (modes, code) in [
        (&[Mode::Audit, Mode::Audit][..], Code::Ok),
        (&[Mode::Audit, Mode::Enforce], Code::Refused),
        (&[Mode::Enforce, Mode::Audit], Code::Refused),
    ] {
        let (_owner, state) = pod(modes);
        let config = DnsConfig {
            upstream,
            cluster: upstream,
            cluster_domain: HostName::parse("cluster.local").unwrap(),
            search_domains: vec![],
        };
        let resolver = Resolver::new(config, state, spool.clone(), Arc::default());
        // A name that no rule has, and a question that is refused whatever the rules.
        for (name, kind) in [
            ("other.example.", RecordType::A),
            ("9.113.0.203.in-addr.arpa.", RecordType::PTR),
        ] {
            let question = Question::new(name, kind);
            let reply = resolver.resolve(POD.parse().unwrap(), &question).await;
            assert_eq!(reply.code, code, "{modes:?} {name}");
        }
    }
    serving.abort();
}

#[test]
fn private_ranges() {
    for (address, private) in [
        ("10.0.0.1", true),
        ("172.16.0.1", true),
        ("192.168.1.1", true),
        ("100.64.0.1", true),
        ("100.128.0.1", false),
        ("fd00::1", true),
        ("203.0.113.1", false),
        ("2001:db8:113::1", false),
    ] {
        assert_eq!(is_private(address.parse().unwrap()), private, "{address}");
    }
}
