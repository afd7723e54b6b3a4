//! What a client's first bytes say: protocol, server name, ALPN, HTTP request line.
//!
//! Everything here is a pure function of bytes that a hostile client chose. It never panics, never
//! looks at more than [`MAX_CLIENT_HELLO`] (or [`http1::MAX_REQUEST_LINE`]) bytes, and is
//! incremental: while the bytes so far decide nothing, the answer is [`Detection::NeedMore`], and
//! the caller asks again with the same bytes and those that followed. How long to wait for them is
//! the caller's decision.
//!
//! 1. [`detect`] tells TLS, HTTP/1 and HTTP/2 apart; whatever else is [`Detection::Opaque`].
//! 2. [`client_hello`] reads a ClientHello across records and segments.
//! 3. [`http1::Scanner`] follows the framing of an HTTP/1 request stream and refuses what two
//!    parsers could read in two ways.

mod client_hello;
pub mod http1;

pub use client_hello::{ClientHello, MAX_CLIENT_HELLO, Refusal, client_hello};

/// HTTP/2's connection preface (RFC 9113 §3.4).
pub const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The bytes that suffice for a verdict of [`detect`], whatever they are.
pub const MAX_DETECT: usize = MAX_CLIENT_HELLO;

/// What the first bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Detection {
    /// A prefix of something known, or nothing yet.
    NeedMore,
    Tls(ClientHello),
    /// A TLS handshake that names its server in no acceptable way, or breaks the protocol.
    BadTls(Refusal),
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    Opaque,
}

/// The protocol of a connection whose client sent `bytes` first.
pub fn detect(bytes: &[u8]) -> Detection {
    match bytes.first() {
        None => Detection::NeedMore,
        // A TLS record of type handshake. No text protocol begins with this byte.
        Some(0x16) => match client_hello(bytes) {
            Ok(None) => Detection::NeedMore,
            Ok(Some(hello)) => Detection::Tls(hello),
            Err(Refusal::NotTls) => Detection::Opaque,
            Err(refusal) => Detection::BadTls(refusal),
        },
        Some(_) => plaintext(bytes),
    }
}

fn plaintext(bytes: &[u8]) -> Detection {
    if bytes.starts_with(HTTP2_PREFACE) {
        return Detection::Http2;
    }
    if HTTP2_PREFACE.starts_with(bytes) {
        return Detection::NeedMore;
    }
    match http1::request_line(bytes) {
        http1::RequestLine::NeedMore => Detection::NeedMore,
        http1::RequestLine::Yes => Detection::Http1,
        http1::RequestLine::No => Detection::Opaque,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_first_flights() {
        for (bytes, expected) in [
            (&b""[..], Detection::NeedMore),
            (b"G", Detection::NeedMore),
            (b"GET / HTTP/1.1", Detection::NeedMore),
            (b"GET / HTTP/1.1\r\n", Detection::Http1),
            (b"\r\nGET / HTTP/1.0\r\n", Detection::Http1),
            (b"M-SEARCH * HTTP/1.1\r\nHost: a\r\n", Detection::Http1),
            (b"GET /\r\n", Detection::Opaque),
            (b"GET key\r\n", Detection::Opaque),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Detection::Http2),
            (b"PRI * HTTP/2.0\r\n", Detection::NeedMore),
            (b"PRI * HTTP/2.0\r\nHost: a\r\n", Detection::Opaque),
            (b"SSH-2.0-OpenSSH_9.6\r\n", Detection::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Detection::Opaque),
            (b"EHLO example\r\n", Detection::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Detection::Opaque),
            (b"\x16\x03\x01", Detection::NeedMore),
            (b"\x16\x09\x09\x00\x05aaaaa", Detection::Opaque),
        ] {
            assert_eq!(
                detect(bytes),
                expected,
                "{:?}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    #[test]
    fn a_request_line_without_end_is_not_waited_for_without_bound() {
        let mut line = b"GET /".to_vec();
        line.resize(http1::MAX_REQUEST_LINE, b'a');
        assert_eq!(detect(&line), Detection::Http1);
        let token = vec![b'A'; http1::MAX_METHOD + 1];
        assert_eq!(detect(&token), Detection::Opaque);
    }

    proptest! {
        #[test]
        fn any_bytes_have_a_verdict(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            detect(&bytes);
        }

        #[test]
        fn a_verdict_does_not_change_when_more_arrives(
            start in prop_oneof![
                Just(b"GET /x HTTP/1.1\r\n".to_vec()),
                Just(HTTP2_PREFACE.to_vec()),
                Just(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03".to_vec()),
                proptest::collection::vec(any::<u8>(), 0..40),
            ],
            rest in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = start;
            bytes.extend(rest);
            let mut decided: Option<Detection> = None;
            for end in 0..=bytes.len() {
                let now = detect(&bytes[..end]);
                if let Some(before) = &decided {
                    prop_assert_eq!(before, &now);
                } else if now != Detection::NeedMore {
                    decided = Some(now);
                }
            }
        }

        #[test]
        fn enough_bytes_always_decide(fill: u8, start in proptest::collection::vec(any::<u8>(), 0..60)) {
            let mut bytes = start;
            bytes.resize(MAX_DETECT, fill);
            prop_assert_ne!(detect(&bytes), Detection::NeedMore);
        }
    }
}
