use std::sync::Arc;

use proptest::prelude::*;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::*;

/// A hello as rustls makes it, post-quantum key share included.
fn real_hello(name: &'static str, alpn: &[&str]) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let mut client = ClientConnection::new(Arc::new(config), name.try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// The same message in records of at most `size` bytes.
fn split_records(hello: &[u8], size: usize) -> Vec<u8> {
    hello[RECORD_HEADER..]
        .chunks(size)
        .flat_map(|chunk| {
            let length = u16::try_from(chunk.len()).unwrap().to_be_bytes();
            [&[HANDSHAKE, 3, 1], &length[..], chunk].concat()
        })
        .collect()
}

fn extension(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    [&kind.to_be_bytes()[..], &length[..], content].concat()
}

fn sni(name: &[u8]) -> Vec<u8> {
    let length = u16::try_from(name.len()).unwrap();
    let list = [&[0][..], &length.to_be_bytes()[..], name].concat();
    let outer = u16::try_from(list.len()).unwrap().to_be_bytes();
    extension(SERVER_NAME, &[&outer[..], &list[..]].concat())
}

/// A minimal hello with these extensions.
fn hello_with(extensions: &[Vec<u8>]) -> Vec<u8> {
    let extensions = extensions.concat();
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message = [&[CLIENT_HELLO], &length[1..], &body[..]].concat();
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    [&[HANDSHAKE, 3, 1], &length[..], &message[..]].concat()
}

#[test]
fn a_real_hello_is_read_at_every_split() {
    let hello = real_hello("p80.web.shop.cluster.svc.turnpike", &["turnpike/h2", "h2"]);
    assert!(
        hello.len() > 1200,
        "a post-quantum key share takes more than one segment"
    );
    for size in [1, 2, 3, 7, 100, 1000, 5000] {
        let bytes = split_records(&hello, size);
        for end in 0..bytes.len() {
            assert_eq!(
                client_hello(&bytes[..end]),
                Ok(None),
                "complete only with the last byte"
            );
        }
        let parsed = client_hello(&bytes).unwrap().unwrap();
        assert_eq!(
            parsed.sni.as_deref(),
            Some("p80.web.shop.cluster.svc.turnpike")
        );
        assert_eq!(parsed.alpn, [b"turnpike/h2".to_vec(), b"h2".to_vec()]);
        assert!(parsed.tls13 && !parsed.ech && parsed.offers_prefix(b"turnpike/"));
    }
}

#[test]
fn what_follows_the_hello_is_ignored() {
    let mut bytes = real_hello("example.com", &[]);
    bytes.extend(b"\x17\x03\x03\x00\x10early data......");
    assert_eq!(
        client_hello(&bytes).unwrap().unwrap().sni.as_deref(),
        Some("example.com")
    );
}

#[test]
fn names_are_normal_or_refused() {
    for (name, expected) in [
        (&b"Example.COM."[..], Ok("example.com")),
        (b"a_b.example", Ok("a_b.example")),
        (b"192.0.2.1", Err(Refusal::AddressAsName)),
        (b"::1", Err(Refusal::AddressAsName)),
        (b"10.1", Err(Refusal::AddressAsName)),
        (b"3221225985", Err(Refusal::AddressAsName)),
        (b"0x7f000001", Err(Refusal::AddressAsName)),
        (b"0300.0.2.0x1", Err(Refusal::AddressAsName)),
        (b"a\0.example", Err(Refusal::InvalidName)),
        (b"a b.example", Err(Refusal::InvalidName)),
        (b"\xff.example", Err(Refusal::InvalidName)),
        (b"a..example", Err(Refusal::InvalidName)),
        (b"", Err(Refusal::InvalidName)),
        (b".", Err(Refusal::InvalidName)),
        ("bücher.example".as_bytes(), Err(Refusal::InvalidName)),
        (&[b'a'; 64], Err(Refusal::InvalidName)),
    ] {
        let parsed = client_hello(&hello_with(&[sni(name)]));
        let parsed = parsed.map(|hello| hello.unwrap().sni.unwrap());
        assert_eq!(
            parsed,
            expected.map(str::to_owned),
            "{:?}",
            String::from_utf8_lossy(name)
        );
    }
}

#[test]
fn ambiguity_is_refused() {
    let twice = hello_with(&[sni(b"good.example"), sni(b"evil.example")]);
    assert_eq!(client_hello(&twice), Err(Refusal::DuplicateExtension));
    let list = [&[0u8, 0, 1][..], b"a", &[0, 0, 1], b"b"].concat();
    let two_names = extension(SERVER_NAME, &[&[0, 8][..], &list].concat());
    assert_eq!(
        client_hello(&hello_with(&[two_names])),
        Err(Refusal::DuplicateExtension)
    );
}

#[test]
fn ech_and_grease_are_seen_and_pass() {
    let hello = hello_with(&[
        extension(0x0a0a, &[]),
        extension(ENCRYPTED_CLIENT_HELLO, &[0; 32]),
        extension(ALPN, b"\0\x06\x02\x0a\x0a\x02h2"),
        sni(b"outer.example"),
    ]);
    let hello = client_hello(&hello).unwrap().unwrap();
    assert!(hello.ech && !hello.tls13);
    assert_eq!(hello.sni.as_deref(), Some("outer.example"));
    assert_eq!(hello.alpn, [b"\x0a\x0a".to_vec(), b"h2".to_vec()]);
}

#[test]
fn a_hello_without_a_name_has_none() {
    let hello = client_hello(&hello_with(&[])).unwrap().unwrap();
    assert_eq!(hello, ClientHello::default());
}

#[test]
fn too_long_is_refused_before_it_is_buffered() {
    let announced = [HANDSHAKE, 3, 1, 0, 4, CLIENT_HELLO, 0, 0x80, 0];
    assert_eq!(client_hello(&announced), Err(Refusal::TooLong));
    let dribbled: Vec<u8> = [HANDSHAKE, 3, 1, 0, 4, CLIENT_HELLO, 0, 0x30, 0]
        .into_iter()
        .chain(
            [HANDSHAKE, 3, 1, 0, 1, 0]
                .into_iter()
                .cycle()
                .take(6 * 3000),
        )
        .collect();
    assert_eq!(client_hello(&dribbled), Err(Refusal::TooLong));
}

#[test]
fn broken_records_are_refused() {
    for bytes in [
        &[HANDSHAKE, 3, 1, 0, 0][..],                    // empty fragment
        &[HANDSHAKE, 3, 1, 0, 1, 2],                     // ServerHello
        &[HANDSHAKE, 3, 1, 0, 1, CLIENT_HELLO, 0x17],    // another record type inside
        &[HANDSHAKE, 3, 1, 0, 4, CLIENT_HELLO, 0, 0, 0], // empty hello
    ] {
        assert_eq!(client_hello(bytes), Err(Refusal::Malformed), "{bytes:?}");
    }
    assert_eq!(client_hello(b"GET / HTTP/1.1\r\n"), Err(Refusal::NotTls));
}

proptest! {
    #[test]
    fn one_changed_byte_never_panics(at in 0usize..1500, value: u8) {
        let mut hello = real_hello("example.com", &["h2"]);
        let at = at % hello.len();
        hello[at] = value;
        let _ = client_hello(&hello);
    }

    #[test]
    fn any_handshake_record_never_panics(content in proptest::collection::vec(any::<u8>(), 1..400)) {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        let bytes = [&[HANDSHAKE, 3, 1], &length[..], &content[..]].concat();
        let _ = client_hello(&bytes);
    }

    #[test]
    fn any_extensions_never_panic(kind in 0u16..50, content in proptest::collection::vec(any::<u8>(), 0..80)) {
        let _ = client_hello(&hello_with(&[extension(kind, &content)]));
    }
}
