//! Any certificate at all: the identity is read right or not at all.

use crate::common::*;
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, SanType};
use turnpike_certs::{InvalidSan, peer_identity};
use turnpike_rules::Identity;

#[derive(Clone, Debug)]
enum Name {
    Uri(String),
    Dns(String),
    Mail(String),
    Ip([u8; 4]),
    Other,
}

fn name() -> impl Strategy<Value = Name> {
    let label = "[a-z]{1,6}";
    prop_oneof![
        5 => (label, label).prop_map(|(ns, sa)| Name::Uri(format!("spiffe://td/ns/{ns}/sa/{sa}"))),
        1 => "[ -~\0]{0,40}".prop_map(Name::Uri),
        1 => "spiffe://td/ns/[a-z/.:@%\0]{0,20}".prop_map(Name::Uri),
        3 => "[a-z]{1,8}\\.[a-z]{1,8}".prop_map(Name::Dns),
        1 => "[a-z]{1,8}@[a-z]{1,8}".prop_map(Name::Mail),
        1 => any::<[u8; 4]>().prop_map(Name::Ip),
        1 => Just(Name::Other),
    ]
}

fn san(name: &Name) -> SanType {
    match name {
        Name::Uri(text) => SanType::URI(text.as_str().try_into().unwrap()),
        Name::Dns(text) => SanType::DnsName(text.as_str().try_into().unwrap()),
        Name::Mail(text) => SanType::Rfc822Name(text.as_str().try_into().unwrap()),
        Name::Ip(bytes) => SanType::IpAddress((*bytes).into()),
        Name::Other => SanType::OtherName((vec![1, 2, 3], "x".into())),
    }
}

/// What must come out, by the rule as it is written.
fn expected(names: &[Name]) -> Option<Identity> {
    let mut uris = Vec::new();
    for name in names {
        match name {
            Name::Uri(uri) => uris.push(uri),
            Name::Dns(_) => {}
            Name::Mail(_) | Name::Ip(_) | Name::Other => return None,
        }
    }
    match uris[..] {
        [uri] => uri.parse().ok(),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn exactly_one_identity_or_none(names in prop::collection::vec(name(), 0..4)) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.iter().map(san).collect();
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        prop_assert_eq!(peer_identity(certificate.der()).ok(), expected(&names));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(peer_identity(&bytes).is_err());
    }

    /// Bits that flip on the way give the same identity, another of the same form, or none.
    #[test]
    fn a_damaged_certificate_is_read_without_a_panic(at in 0usize..400, bit in 0u8..8) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(identity("web").to_string().try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let mut der = params.self_signed(&key).unwrap().der().to_vec();
        let at = at % der.len();
        der[at] ^= 1 << bit;
        if let Ok(found) = peer_identity(&der) {
            prop_assert_eq!(found.to_string().parse::<Identity>().unwrap(), found);
        }
    }
}

#[test]
fn bytes_after_the_certificate_are_refused() {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(
        identity("web").to_string().try_into().unwrap(),
    )];
    let key = KeyPair::generate().unwrap();
    let mut der = params.self_signed(&key).unwrap().der().to_vec();
    assert_eq!(peer_identity(&der), Ok(identity("web")));
    der.push(0);
    assert_eq!(peer_identity(&der), Err(InvalidSan::Malformed));
}
