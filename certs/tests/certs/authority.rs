//! What the CA issues, and what it refuses.

use std::time::{Duration, SystemTime};

use crate::common::*;
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use turnpike_certs::{
    Authority, AuthorityError, CLOCK_SKEW, Credentials, InvalidBundle, InvalidCredentials,
    KeyRequest, LEAF_LIFETIME, SignError, TrustBundle, verify_signature,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

fn now() -> SystemTime {
    SystemTime::now()
}

fn csr(names: Vec<SanType>, key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.serialize_request(key).unwrap().pem().unwrap()
}

#[test]
fn a_leaf_says_who_it_is_and_nothing_else() {
    let root = authority();
    let web = identity("web");
    let request = KeyRequest::new(&web).unwrap();
    let now = now();
    let issued = root
        .sign(request.csr_pem(), &web, LEAF_LIFETIME, now)
        .unwrap();
    assert_eq!(issued.chain.len(), 2, "leaf first, root last");
    assert_eq!(issued.chain[1], root.certificate_pem());

    let der = CertificateDer::from_pem_slice(issued.chain[0].as_bytes()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let san = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(
        san.critical,
        "RFC 5280: critical where the subject is empty"
    );
    let uri = web.to_string();
    assert_eq!(san.value.general_names, [GeneralName::URI(&uri)]);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.client_auth && extended.server_auth && !extended.any);
    assert!(!leaf.is_ca());

    let life = leaf.validity();
    let (begin, end) = (life.not_before.timestamp(), life.not_after.timestamp());
    assert_eq!(
        end - begin,
        (LEAF_LIFETIME + CLOCK_SKEW).as_secs().cast_signed()
    );
    let credentials = request
        .into_credentials(&issued.chain, bundle(&[&root]))
        .unwrap();
    assert_eq!(credentials.identity(), &web);
    assert_eq!(credentials.not_before(), issued.not_before);
    assert_eq!(credentials.not_after(), issued.not_after);
    assert!(!credentials.expired(now) && credentials.expired(issued.not_after));
}

#[test]
fn nothing_outlives_its_issuer() {
    let hour = Duration::from_secs(3600);
    let root = Authority::generate("cluster.local", hour, now()).unwrap();
    let web = identity("web");
    let request = KeyRequest::new(&web).unwrap();
    let issued = root
        .sign(request.csr_pem(), &web, LEAF_LIFETIME, now())
        .unwrap();
    assert_eq!(issued.not_after, root.not_after());

    let late = root.sign(request.csr_pem(), &web, LEAF_LIFETIME, now() + 2 * hour);
    assert!(matches!(late, Err(SignError::IssuerExpired)), "{late:?}");
}

#[test]
fn a_request_for_another_identity_is_refused_by_name() {
    let root = authority();
    let request = KeyRequest::new(&identity("admin")).unwrap();
    let refused = root.sign(request.csr_pem(), &identity("web"), LEAF_LIFETIME, now());
    let text = refused.unwrap_err().to_string();
    assert_eq!(
        text,
        "the request asks for `spiffe://cluster.local/ns/shop/sa/admin`, but its sender is \
         spiffe://cluster.local/ns/shop/sa/web"
    );
}

#[test]
fn names_beside_the_identity_are_refused_unless_they_are_given() {
    let root = authority();
    let web = identity("web");
    let key = KeyPair::generate().unwrap();
    let dns = || SanType::DnsName("api.example".try_into().unwrap());
    for name in [dns(), SanType::IpAddress([10, 0, 0, 1].into())] {
        let refused = root.sign(&csr(vec![name], &key), &web, LEAF_LIFETIME, now());
        assert!(
            matches!(refused, Err(SignError::WrongIdentity { .. })),
            "{refused:?}"
        );
    }
    let csr = csr(vec![dns()], &key);
    root.sign_server(&csr, &web, &["api.example"], LEAF_LIFETIME, now())
        .unwrap();
}

#[test]
fn a_request_without_names_gets_its_senders() {
    let root = authority();
    let web = identity("web");
    let key = KeyPair::generate().unwrap();
    let issued = root
        .sign(&csr(vec![], &key), &web, LEAF_LIFETIME, now())
        .unwrap();
    let leaf = CertificateDer::from_pem_slice(issued.chain[0].as_bytes()).unwrap();
    assert_eq!(turnpike_certs::peer_identity(&leaf).unwrap(), web);
}

#[test]
fn malformed_requests_are_refused() {
    let root = authority();
    let web = identity("web");
    let sign = |csr: &str| root.sign(csr, &web, LEAF_LIFETIME, now()).unwrap_err();
    assert!(matches!(sign(""), SignError::Malformed(_)));
    assert!(matches!(sign("no PEM at all"), SignError::Malformed(_)));
    assert!(matches!(
        sign(root.certificate_pem()),
        SignError::Malformed(_)
    ));
    assert!(matches!(
        sign(&"x".repeat(20_000)),
        SignError::TooLong(20_000)
    ));

    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    assert!(matches!(sign(&csr(vec![], &p384)), SignError::KeyType));
    let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    assert!(matches!(sign(&csr(vec![], &ed25519)), SignError::KeyType));
}

#[test]
fn a_request_whose_sender_does_not_hold_the_key_is_refused() {
    let root = authority();
    let web = identity("web");
    let csr = csr(vec![], &KeyPair::generate().unwrap());
    let mut der = rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(csr.as_bytes())
        .unwrap()
        .to_vec();
    // The last bytes are the signature's `s`.
    *der.last_mut().unwrap() ^= 1;
    let pem = pem("CERTIFICATE REQUEST", &der);
    let refused = root.sign(&pem, &web, LEAF_LIFETIME, now());
    assert!(matches!(refused, Err(SignError::Signature)), "{refused:?}");
}

#[test]
fn a_root_is_taken_up_again() {
    let root = authority();
    let again = Authority::from_pem(root.certificate_pem(), &root.key_pem()).unwrap();
    assert_eq!(again.certificate(), root.certificate());
    assert_eq!(again.not_after(), root.not_after());
    // What the one signs, the other's bundle trusts.
    credentials(&again, &identity("web"), &bundle(&[&root]));
}

#[test]
fn nothing_but_the_certificate_is_handed_out() {
    let root = authority();
    let (certificate, key) = (root.certificate_pem(), root.key_pem());
    for file in [
        format!("{certificate}{}", *key),
        format!("{}{certificate}", *key),
        format!("-----BEGIN CERTIFICATE-----\n{}{certificate}", *key),
        format!("subject: root\n{certificate}a note\n"),
    ] {
        let again = Authority::from_pem(&file, &key).unwrap();
        assert_eq!(again.certificate_pem(), certificate);
        let web = identity("web");
        let request = KeyRequest::new(&web).unwrap();
        let issued = again.sign(request.csr_pem(), &web, LEAF_LIFETIME, now());
        assert!(!issued.unwrap().chain.concat().contains("PRIVATE"));
    }
}

#[test]
fn a_root_of_mixed_parts_is_refused() {
    let (root, other) = (authority(), authority());
    let mixed = Authority::from_pem(root.certificate_pem(), &other.key_pem());
    assert!(
        matches!(mixed, Err(AuthorityError::KeyMismatch)),
        "{mixed:?}"
    );

    let (leaf, _) = leaf_with(&root, vec![]);
    let leaf = pem("CERTIFICATE", &leaf[0]);
    let no_ca = Authority::from_pem(&leaf, &root.key_pem());
    assert!(
        matches!(
            no_ca,
            Err(AuthorityError::Certificate(InvalidBundle::NotCa(0)))
        ),
        "{no_ca:?}"
    );
}

#[test]
fn a_bundle_is_all_roots_or_none() {
    let (first, second) = (authority(), authority());
    let two = format!("{}{}", first.certificate_pem(), second.certificate_pem());
    assert_eq!(
        TrustBundle::from_pem(two.as_bytes()).unwrap(),
        bundle(&[&first, &second])
    );
    assert_eq!(
        TrustBundle::from_pem(b"").unwrap_err(),
        InvalidBundle::Empty
    );
    let (leaf, _) = leaf_with(&first, vec![]);
    let mixed = format!(
        "{}{}",
        first.certificate_pem(),
        pem("CERTIFICATE", &leaf[0])
    );
    assert_eq!(
        TrustBundle::from_pem(mixed.as_bytes()).unwrap_err(),
        InvalidBundle::NotCa(1)
    );
}

#[test]
fn credentials_of_mixed_parts_are_refused() {
    let root = authority();
    let (web, roots) = (identity("web"), bundle(&[&root]));
    let (mine, theirs) = (
        KeyRequest::new(&web).unwrap(),
        KeyRequest::new(&web).unwrap(),
    );
    let issued = root
        .sign(theirs.csr_pem(), &web, LEAF_LIFETIME, now())
        .unwrap();
    let mixed = mine.into_credentials(&issued.chain, roots.clone());
    assert!(
        matches!(mixed, Err(InvalidCredentials::KeyMismatch)),
        "{mixed:?}"
    );

    let untrusted = theirs.into_credentials(&issued.chain, bundle(&[&authority()]));
    assert!(
        matches!(untrusted, Err(InvalidCredentials::Untrusted(_))),
        "{untrusted:?}"
    );

    let none: [&str; 0] = [];
    let empty = KeyRequest::new(&web)
        .unwrap()
        .into_credentials(&none, roots);
    assert!(
        matches!(empty, Err(InvalidCredentials::EmptyChain)),
        "{empty:?}"
    );
}

#[test]
fn keys_are_never_shown() {
    let root = authority();
    let web = identity("web");
    let key = root.key_pem();
    let secret = key.lines().nth(1).unwrap();
    assert!(!format!("{root:?}").contains(secret));
    let request = KeyRequest::new(&web).unwrap();
    assert!(format!("{request:?}").contains("<redacted>"));
    let credentials: Credentials = credentials(&root, &web, &bundle(&[&root]));
    let shown = format!("{credentials:?}");
    assert!(
        shown.contains("<redacted>") && shown.contains(&web.to_string()),
        "{shown}"
    );
}

#[test]
fn what_a_workload_signs_its_certificate_verifies() {
    let root = authority();
    let credentials = credentials(&root, &identity("gate"), &bundle(&[&root]));
    let signature = credentials.sign(b"checkpoint 7").unwrap();
    let leaf = &credentials.chain()[0];
    assert!(verify_signature(leaf, b"checkpoint 7", &signature));
    assert!(!verify_signature(leaf, b"checkpoint 8", &signature));
    assert!(!verify_signature(
        root.certificate(),
        b"checkpoint 7",
        &signature
    ));
    assert!(!verify_signature(
        b"no certificate",
        b"checkpoint 7",
        &signature
    ));
}

fn pem(label: &str, der: &[u8]) -> String {
    // rcgen's own writer is not public; the format is.
    let body = base64(der);
    format!("-----BEGIN {label}-----\n{body}-----END {label}-----\n")
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for (index, chunk) in bytes.chunks(3).enumerate() {
        let word = chunk
            .iter()
            .fold(0u32, |word, byte| word << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let symbol = DIGITS[(word >> (18 - 6 * digit)) as usize & 63];
            text.push(if digit <= chunk.len() {
                char::from(symbol)
            } else {
                '='
            });
        }
        if index % 16 == 15 {
            text.push('\n');
        }
    }
    text.push('\n');
    text
}
