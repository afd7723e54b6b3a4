//! Request and response heads: checked, put into one form, and rid of what belongs to one hop.

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header, request::Parts,
    uri::PathAndQuery,
};
use turnpike_detect::http1::{lists, may_leave_for};
use turnpike_rules::{
    host::{self, HostOrIp},
    path,
};

use crate::error::ProxyError;

/// Says to an application who calls; this proxy alone may set it.
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// What only a proxy may say to an application: who calls, in Envoy's and Istio's words too.
const INTERNAL: [&str; 6] = [
    "x-forwarded-client-cert",
    "x-envoy-internal",
    "x-envoy-original-dst-host",
    "x-envoy-peer-metadata",
    "x-envoy-peer-metadata-id",
    "x-istio-attributes",
];
/// And whatever begins like this.
const OURS: &str = "x-turnpike-";

/// What this proxy takes from a message or writes into it. With an underscore it means nothing
/// here, and may to a server that takes `_` and `-` for the same, as CGI and its heirs do.
const TAKEN: [&str; 10] = [
    "content-length",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "x-b3-flags",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-spanid",
    "x-b3-traceid",
];

/// Constants: a name given as text is parsed at each look.
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// What a checked request head says.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// `None`: an HTTP/1.0 request without Host.
    pub(crate) host: Option<HostOrIp>,
    pub(crate) grpc: bool,
    /// It asks to leave HTTP: CONNECT, or an Upgrade that may be granted.
    pub(crate) upgrade: bool,
}

fn malformed(why: &str) -> ProxyError {
    ProxyError::Malformed(why.to_owned())
}

/// Checks a request's head and takes from it what was meant for this hop.
pub(crate) fn check(parts: &mut Parts) -> Result<Checked, ProxyError> {
    let authority = match parts.version {
        Version::HTTP_2 => http2_authority(parts)?,
        _ => http1_authority(parts)?,
    };
    let host = match authority {
        Some(authority) => {
            let text = authority
                .to_str()
                .map_err(|_| malformed("Host is not ASCII"))?;
            let (host, _) = host::authority(text)
                .map_err(|why| ProxyError::Malformed(format!("Host: {why}")))?;
            Some(host)
        }
        None => None,
    };
    let upgrade = take_hop(parts);
    let content_type = parts
        .headers
        .get(header::CONTENT_TYPE)
        .map(HeaderValue::as_bytes);
    let grpc = content_type.is_some_and(|value| value.starts_with(b"application/grpc"));
    Ok(Checked {
        host,
        grpc,
        upgrade,
    })
}

/// Host, which must be there once. In absolute form the target's authority is what counts, and
/// a Host that differs is refused.
fn http1_authority(parts: &mut Parts) -> Result<Option<HeaderValue>, ProxyError> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err(malformed("Host is present twice"));
    }
    if host.is_none() && parts.version == Version::HTTP_11 {
        return Err(malformed("Host is missing"));
    }
    if parts.method == Method::CONNECT {
        let target = parts
            .uri
            .authority()
            .ok_or_else(|| malformed("CONNECT without authority"))?;
        let target = HeaderValue::try_from(target.as_str()).ok();
        return if same_authority(target.as_ref(), host.as_ref()) || host.is_none() {
            Ok(target)
        } else {
            Err(malformed("the authority of CONNECT and Host differ"))
        };
    }
    let Some(authority) = parts.uri.authority() else {
        return Ok(host);
    };
    if parts.uri.scheme_str() != Some("http") {
        return Err(malformed(
            "a plaintext request for another scheme than http",
        ));
    }
    let target = HeaderValue::try_from(authority.as_str()).ok();
    if host.is_some() && !same_authority(target.as_ref(), host.as_ref()) {
        return Err(malformed("the authority of the target and Host differ"));
    }
    if let Some(target) = &target {
        parts.headers.insert(header::HOST, target.clone());
    }
    let path = parts.uri.path_and_query().cloned();
    parts.uri = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    Ok(target)
}

fn http2_authority(parts: &mut Parts) -> Result<Option<HeaderValue>, ProxyError> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err(malformed("Host is present twice"));
    }
    let authority = parts
        .uri
        .authority()
        .map(|a| HeaderValue::try_from(a.as_str()));
    match (authority, host) {
        (Some(Ok(authority)), None) => Ok(Some(authority)),
        (Some(Ok(authority)), Some(host)) => {
            if !same_authority(Some(&authority), Some(&host)) {
                return Err(malformed(":authority and Host differ"));
            }
            parts.headers.remove(header::HOST);
            Ok(Some(authority))
        }
        (None, Some(host)) => Ok(Some(host)),
        _ => Err(malformed(":authority is missing")),
    }
}

fn same_authority(a: Option<&HeaderValue>, b: Option<&HeaderValue>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.as_bytes().eq_ignore_ascii_case(b.as_bytes()),
        _ => false,
    }
}

/// Takes what concerns one hop alone; true where the request asks to leave HTTP and may.
fn take_hop(parts: &mut Parts) -> bool {
    let connect = parts.method == Method::CONNECT;
    if parts.version == Version::HTTP_2 {
        // h2 has refused connection-specific fields but `te: trailers`; extended CONNECT is not
        // offered.
        return connect;
    }
    let upgrade = connect || parts.version == Version::HTTP_11 && asks_to_upgrade(&parts.headers);
    let kept = upgrade
        .then(|| parts.headers.get(header::UPGRADE).cloned())
        .flatten();
    strip_hop(&mut parts.headers);
    parts.headers.remove(&HTTP2_SETTINGS);
    if let Some(protocol) = kept {
        parts.headers.insert(header::UPGRADE, protocol);
        parts
            .headers
            .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    }
    upgrade
}

/// RFC 9110 §7.8. The scanner in front of the parser asks the same: where it does not stop to
/// follow requests, none leaves HTTP.
fn asks_to_upgrade(headers: &HeaderMap) -> bool {
    let mut offers = headers.get_all(header::UPGRADE).iter();
    let offered = offers.next().is_some_and(|p| may_leave_for(p.as_bytes()));
    let connection = headers.get_all(header::CONNECTION);
    let nominated = |value: &HeaderValue| lists(value.as_bytes(), b"upgrade");
    offered && offers.next().is_none() && connection.iter().any(nominated)
}

/// Names that `Connection` may nominate without effect: what frames and directs the message.
const NEVER_STRIPPED: [HeaderName; 4] = [
    header::HOST,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::AUTHORIZATION,
];

/// RFC 9110 §7.6.1: `Connection` and what it nominates, and those that are for one hop anyway.
pub(crate) fn strip_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let nominated: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
            .filter(|name| !NEVER_STRIPPED.contains(name) && *name != header::TE)
            .collect();
        headers.remove(header::CONNECTION);
        for name in nominated {
            headers.remove(name);
        }
    }
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::UPGRADE);
    headers.remove(&KEEP_ALIVE);
    headers.remove(&PROXY_CONNECTION);
    strip_te(headers);
}

/// Of what the sender takes in transfer codings, whether it takes trailers holds on the next hop
/// too; gRPC's servers ask for it.
fn strip_te(headers: &mut HeaderMap) {
    const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");
    let (mut trailers, mut others) = (false, false);
    for value in headers.get_all(header::TE) {
        for coding in value.as_bytes().split(|byte| *byte == b',') {
            let is_trailers = coding.trim_ascii().eq_ignore_ascii_case(b"trailers");
            others |= trailers || !is_trailers;
            trailers |= is_trailers;
        }
    }
    match (trailers, others) {
        (true, true) => drop(headers.insert(header::TE, TRAILERS)),
        (false, true) => drop(headers.remove(header::TE)),
        (_, false) => {}
    }
}

/// Takes what only a proxy may say to an application, and what a server may take for what frames
/// the message, in all spellings that a server may take for the same.
pub(crate) fn strip_internal(headers: &mut HeaderMap) {
    while let Some(name) = headers.keys().find(|name| is_internal(name.as_str())) {
        let name = name.clone();
        headers.remove(name);
    }
}

fn is_internal(name: &str) -> bool {
    let folds = name.contains('_');
    if !folds && !name.starts_with('x') {
        return false;
    }
    let spells = |name: &str, known: &str| {
        let mut pairs = known.bytes().zip(name.bytes());
        known.len() == name.len() && pairs.all(|(k, n)| k == n || k == b'-' && n == b'_')
    };
    let among = |known: &[&str]| known.iter().any(|known| spells(name, known));
    let ours = name
        .get(..OURS.len())
        .is_some_and(|start| spells(start, OURS));
    ours || among(&INTERNAL) || folds && among(&TAKEN)
}

/// The path in the form that is judged; `Cow::Owned` where it differs from what came.
pub(crate) fn normal_path(uri: &Uri) -> Result<Cow<'_, str>, ProxyError> {
    path::normalise(uri.path()).map_err(|why| ProxyError::Malformed(format!("path: {why}")))
}

/// Puts another path in place, keeping the query.
pub(crate) fn set_path(uri: &mut Uri, path: &str) -> Result<(), ProxyError> {
    let text = match uri.query() {
        Some(query) => Cow::Owned(format!("{path}?{query}")),
        None => Cow::Borrowed(path),
    };
    let invalid = || malformed("the path cannot be written as a URI");
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(text.as_ref()).map_err(|_| invalid())?);
    *uri = Uri::from_parts(parts).map_err(|_| invalid())?;
    Ok(())
}

/// Names another host in place of the one asked for.
pub(crate) fn set_host(parts: &mut Parts, host: &str) -> Result<(), ProxyError> {
    let invalid = || malformed("the route's host cannot be written as an authority");
    if parts.version == Version::HTTP_2 {
        let mut uri = std::mem::take(&mut parts.uri).into_parts();
        uri.authority = Some(host.parse().map_err(|_| invalid())?);
        parts.uri = Uri::from_parts(uri).map_err(|_| invalid())?;
    } else {
        let host = HeaderValue::try_from(host).map_err(|_| invalid())?;
        parts.headers.insert(header::HOST, host);
    }
    Ok(())
}

/// Says who calls, in place of whatever the caller said itself.
pub(crate) fn set_client_cert(headers: &mut HeaderMap, value: Option<&HeaderValue>) {
    strip_internal(headers);
    if let Some(value) = value {
        headers.insert(CLIENT_CERT, value.clone());
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(request: http::request::Builder) -> Parts {
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn nominated_headers_go_and_framing_stays() {
        let mut parts = parts(
            Request::get("/")
                .header("host", "a")
                .header("connection", "X-Identity, host, close")
                .header("x-identity", "admin")
                .header("keep-alive", "5")
                .header("te", "trailers"),
        );
        check(&mut parts).unwrap();
        let left: Vec<_> = parts.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["host", "te"]);
    }

    #[test]
    fn authorities_must_agree() {
        for (target, hosts, fine) in [
            ("/", vec!["a.example"], true),
            ("/", vec![], false),
            ("/", vec!["a", "a"], false),
            ("/", vec!["allowed@evil"], false),
            ("/", vec!["a b"], false),
            ("http://a.example/x", vec!["A.example"], true),
            ("http://a.example/x", vec!["b.example"], false),
            ("https://a.example/x", vec!["a.example"], false),
        ] {
            let mut builder = Request::get(target);
            for host in &hosts {
                builder = builder.header("host", *host);
            }
            let mut parts = parts(builder);
            assert_eq!(check(&mut parts).is_ok(), fine, "{target} {hosts:?}");
            if fine {
                assert!(parts.uri.authority().is_none(), "sent in origin form");
            }
        }
        let mut differs = parts(
            Request::get("http://a/")
                .version(Version::HTTP_2)
                .header("host", "b"),
        );
        assert!(check(&mut differs).is_err());
    }

    #[test]
    fn of_all_transfer_codings_trailers_alone_stay() {
        for (values, left) in [
            (vec!["trailers"], Some("trailers")),
            (vec!["Trailers "], Some("Trailers")),
            (vec!["gzip"], None),
            (vec!["trailers", "chunked"], Some("trailers")),
            (vec!["gzip;q=0.5, trailers"], Some("trailers")),
            (vec!["trailers", "trailers"], Some("trailers")),
            (vec!["trailers;q=1"], None),
        ] {
            let mut request = Request::get("/").header("host", "a");
            for value in &values {
                request = request.header("te", value.trim());
            }
            let mut parts = parts(request);
            check(&mut parts).unwrap();
            let te: Vec<_> = parts.headers.get_all("te").iter().collect();
            assert_eq!(te, left.into_iter().collect::<Vec<_>>(), "{values:?}");
        }
    }

    #[test]
    fn what_only_a_proxy_says_goes_in_every_spelling() {
        let spoofed = [
            "x-forwarded-client-cert",
            "X-Forwarded_Client_Cert",
            "x_forwarded_client_cert",
            "x-envoy-peer-metadata",
            "x_envoy_peer_metadata_id",
            "X-Turnpike-Error",
            "x_turnpike_anything",
            "transfer_encoding",
            "Content_Length",
            "x_b3-sampled",
        ];
        let kept = [
            "x-b3-sampled",
            "x-forwarded-for",
            "x-turnpikes",
            "under_score",
            "x-forwarded-client-certs",
        ];
        let mut headers = HeaderMap::new();
        for name in spoofed.iter().chain(&kept) {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            headers.append(&name, HeaderValue::from_static("a"));
            headers.append(&name, HeaderValue::from_static("b"));
        }
        strip_internal(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        let mut kept = kept.to_vec();
        left.sort_unstable();
        kept.sort_unstable();
        assert_eq!(left, kept);
    }

    #[test]
    fn an_upgrade_that_connection_does_not_name_is_for_this_hop() {
        let headers = |version, upgrade: &[&'static str], connection: &'static str| {
            let mut request = Request::get("/").version(version).header("host", "a");
            for protocol in upgrade {
                request = request.header("upgrade", *protocol);
            }
            parts(request.header("connection", connection))
        };
        let (old, new) = (Version::HTTP_10, Version::HTTP_11);
        for (version, upgrade, connection) in [
            (new, &["websocket"][..], "keep-alive"),
            (new, &["websocket"], "upgrades"),
            (new, &["websocket, h2c"], "upgrade"),
            (new, &["websocket", "h2c"], "upgrade"),
            (new, &["h2c", "websocket"], "upgrade"),
            (new, &[""], "upgrade"),
            (old, &["websocket"], "upgrade"),
        ] {
            let mut parts = headers(version, upgrade, connection);
            assert!(
                !check(&mut parts).unwrap().upgrade,
                "{upgrade:?} {connection}"
            );
            assert_eq!(parts.headers.len(), 1, "{:?}", parts.headers);
        }
        let mut parts = headers(new, &["websocket"], "keep-alive, Upgrade");
        assert!(check(&mut parts).unwrap().upgrade);
    }

    #[test]
    fn cleartext_http2_is_not_upgraded_to() {
        let websocket = Request::get("/")
            .header("host", "a")
            .header("upgrade", "websocket");
        let mut websocket = parts(websocket.header("connection", "upgrade"));
        assert!(check(&mut websocket).unwrap().upgrade);
        assert_eq!(websocket.headers["upgrade"], "websocket");
        let h2c = Request::get("/")
            .header("host", "a")
            .header("upgrade", "h2c");
        let h2c = h2c
            .header("connection", "upgrade, http2-settings")
            .header("http2-settings", "x");
        let mut h2c = parts(h2c);
        assert!(!check(&mut h2c).unwrap().upgrade);
        assert_eq!(h2c.headers.len(), 1);
    }

    #[test]
    fn paths_are_replaced_without_their_query() {
        let mut uri: Uri = "http://a/b/../c?d=e".parse().unwrap();
        let normal = normal_path(&uri).unwrap().into_owned();
        set_path(&mut uri, &normal).unwrap();
        assert_eq!(uri.to_string(), "http://a/c?d=e");
    }
}
