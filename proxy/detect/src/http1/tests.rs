use proptest::prelude::*;

use super::*;

fn scan_in_pieces(bytes: &[u8], piece: usize) -> (Scanner, Option<Violation>) {
    let mut scanner = Scanner::default();
    for chunk in bytes.chunks(piece) {
        if let Err((at, why)) = scanner.scan(chunk) {
            assert!(at < chunk.len(), "the place lies within what was given");
            return (scanner, Some(why));
        }
    }
    (scanner, None)
}

#[test]
fn verdicts_hold_in_any_pieces() {
    let head = "POST / HTTP/1.1\r\nHost: a\r\n";
    for (rest, expected) in [
        ("\r\n".to_owned(), None),
        ("Content-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n".into(), None),
        ("Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nT: v\r\n\r\nGET / HTTP/1.1\r\n\r\n".into(), None),
        ("Transfer-Encoding: Chunked \r\n\r\n0\r\n\r\n".into(), None),
        ("Content-Length: 3\r\n\r\n\n\n\nGET / HTTP/1.1\r\n\r\n".into(), None),
        (format!("X: {}\r\n\r\n", "y".repeat(9000)), None),
        ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n".into(), Some(Violation::TwoFramings)),
        ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n".into(), Some(Violation::TwoFramings)),
        ("Content-Length: 3\r\nContent-Length: 3\r\n\r\n".into(), Some(Violation::ContentLength)),
        ("Content-Length: 3, 3\r\n\r\n".into(), Some(Violation::ContentLength)),
        ("Content-Length: +3\r\n\r\n".into(), Some(Violation::ContentLength)),
        ("Content-Length:\r\n\r\n".into(), Some(Violation::ContentLength)),
        ("content-length: 99999999999999999999999\r\n\r\n".into(), Some(Violation::ContentLength)),
        (format!("Content-Length:{}3\r\n\r\n", " ".repeat(80)), Some(Violation::ContentLength)),
        ("Transfer-Encoding: xchunked\r\n\r\n".into(), Some(Violation::TransferEncoding)),
        ("Transfer-Encoding: gzip, chunked\r\n\r\n".into(), Some(Violation::TransferEncoding)),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n".into(), Some(Violation::TransferEncoding)),
        ("X: a\r\n b\r\n\r\n".into(), Some(Violation::FoldedHeader)),
        ("X: a\n\r\n".into(), Some(Violation::BareLineFeed)),
        ("X: a\r\n\n".into(), Some(Violation::BareLineFeed)),
        ("Content-Length : 3\r\n\r\n".into(), Some(Violation::SpaceBeforeColon)),
        ("Transfer-Encoding: chunked\r\n\r\n3\nabc".into(), Some(Violation::BareLineFeed)),
        ("Transfer-Encoding: chunked\r\n\r\n3;a\n0\r\n".into(), Some(Violation::BareLineFeed)),
        ("Transfer-Encoding: chunked\r\n\r\n3x\r\nabc\r\n".into(), Some(Violation::ChunkSize)),
        ("Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n".into(), Some(Violation::ChunkSize)),
        ("Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n".into(), Some(Violation::ChunkSize)),
        ("Transfer-Encoding: chunked\r\n\r\n\r\n".into(), Some(Violation::ChunkSize)),
        ("Transfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n".into(), Some(Violation::ChunkSize)),
        ("Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n".into(), Some(Violation::ChunkSize)),
        (format!("Transfer-Encoding: chunked\r\n\r\n1;{}\r\n", "x".repeat(300)), Some(Violation::TooLong)),
        (format!("X: {}", "y".repeat(MAX_LINE)), Some(Violation::TooLong)),
    ] {
        let bytes = format!("{head}{rest}").into_bytes();
        for piece in [1, 2, 3, 7, 64, bytes.len()] {
            let (_, verdict) = scan_in_pieces(&bytes, piece);
            assert_eq!(verdict, expected, "in pieces of {piece}: {rest:.60}");
        }
    }
}

#[test]
fn an_old_client_cannot_chunk() {
    let bytes = b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(
        scan_in_pieces(bytes, 5).1,
        Some(Violation::OldTransferEncoding)
    );
}

#[test]
fn smuggled_framing_in_a_pipelined_request_is_found() {
    let bytes = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nContent-Length: 4\r\n\
        Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(scan_in_pieces(bytes, 11).1, Some(Violation::TwoFramings));
}

#[test]
fn nothing_is_read_into_what_follows_an_upgrade() {
    for head in [
        "CONNECT a:1 HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nupgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n",
    ] {
        let bytes = format!("{head}Host: a\r\n\r\n\n\nraw\n").into_bytes();
        assert_eq!(scan_in_pieces(&bytes, 3).1, None);
    }
}

#[test]
fn a_request_that_only_seems_to_leave_http_stays_followed() {
    let long = format!("Upgrade: {}\r\nConnection: upgrade", "x".repeat(KEPT));
    for (version, headers) in [
        ("1.1", "Upgrade: h2c\r\nConnection: upgrade"),
        ("1.1", "Upgrade: websocket, h2c\r\nConnection: upgrade"),
        (
            "1.1",
            "Upgrade: websocket\r\nUpgrade: h2c\r\nConnection: upgrade",
        ),
        (
            "1.1",
            "Upgrade: h2c\r\nUpgrade: websocket\r\nConnection: upgrade",
        ),
        ("1.1", "Upgrade: \r\nConnection: upgrade"),
        ("1.1", "Upgrade: websocket"),
        (
            "1.1",
            "Upgrade: websocket\r\nConnection: keep-alive, upgrades",
        ),
        ("1.0", "Upgrade: websocket\r\nConnection: upgrade"),
        ("1.1", &long),
    ] {
        let bytes = format!("GET / HTTP/{version}\r\n{headers}\r\n\r\nGET /\n");
        let verdict = scan_in_pieces(bytes.as_bytes(), 9).1;
        assert_eq!(
            verdict,
            Some(Violation::BareLineFeed),
            "{version} {headers}"
        );
    }
}

#[test]
fn position_in_the_stream_is_known() {
    let mut scanner = Scanner::default();
    assert!(!scanner.in_head() && !scanner.in_body());
    scanner.scan(b"PO").unwrap();
    assert!(scanner.in_head());
    scanner
        .scan(b"ST / HTTP/1.1\r\nContent-Length: 2\r\n\r")
        .unwrap();
    assert!(scanner.in_head());
    scanner.scan(b"\na").unwrap();
    assert!(!scanner.in_head() && scanner.in_body());
    scanner.scan(b"b").unwrap();
    assert!(!scanner.in_head() && !scanner.in_body());
}

proptest! {
    #[test]
    fn any_bytes_in_any_pieces_have_one_verdict(
        bytes in proptest::collection::vec(prop_oneof![
            any::<u8>(),
            proptest::sample::select(b"\r\n :;3a".to_vec()),
        ], 0..300),
        piece in 1usize..40,
    ) {
        let head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        for bytes in [bytes.clone(), [&head[..], &bytes[..]].concat()] {
            let whole = scan_in_pieces(&bytes, bytes.len().max(1)).1;
            prop_assert_eq!(scan_in_pieces(&bytes, piece).1, whole);
        }
    }
}
