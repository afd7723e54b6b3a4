//! A plaintext request: which host it is for, and the one form in which it is judged and sent on.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version, header,
    uri::PathAndQuery,
};
use turnpike_rules::{
    host::{self, HostName, HostOrIp, InvalidHost},
    path::{self, InvalidPath},
};

/// A request's target, beyond doubt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// None: an address, or (in HTTP/1.0) nothing.
    pub(crate) host: Option<HostName>,
    /// As it is sent on.
    pub(crate) host_header: Option<HeaderValue>,
    pub(crate) method: Method,
    pub(crate) path: String,
    query: Option<String>,
}

/// Why a request is not judged at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidRequest {
    #[error("the request has no Host; HTTP/1.1 requires one")]
    NoHost,
    #[error("the request has several Hosts; send one")]
    SeveralHosts,
    #[error("the Host is not a host name with an optional port: {0}")]
    Host(InvalidHost),
    #[error("the Host is not text")]
    HostNotText,
    #[error("the request line names another host than Host does")]
    HostMismatch,
    #[error("the request line has a scheme other than http")]
    Scheme,
    #[error("Host names port {0}, but the connection is to port {1}")]
    Port(u16, u16),
    #[error("path: {0}")]
    Path(#[from] InvalidPath),
    #[error("the request target is neither a path nor an http URL")]
    Target,
    #[error("CONNECT would open a tunnel whose content no rule could judge; connect directly")]
    Connect,
    #[error("Upgrade would leave HTTP, where no rule could judge what follows; do not upgrade")]
    Upgrade,
}

impl InvalidRequest {
    /// 403 for what is clear but never allowed, 400 for what is not clear.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Connect | Self::Upgrade => StatusCode::FORBIDDEN,
            _ => StatusCode::BAD_REQUEST,
        }
    }
}

impl Target {
    /// Reads the target of a request on a connection to `port`.
    pub(crate) fn of<B>(request: &Request<B>, port: u16) -> Result<Self, InvalidRequest> {
        if request.method() == Method::CONNECT {
            return Err(InvalidRequest::Connect);
        }
        if request.headers().contains_key(header::UPGRADE) || nominates_upgrade(request.headers()) {
            return Err(InvalidRequest::Upgrade);
        }
        let uri = request.uri();
        let named = named_host(request)?;
        if let Some(authority) = uri.authority() {
            if uri.scheme_str() != Some("http") {
                return Err(InvalidRequest::Scheme);
            }
            let in_line = host::authority(authority.as_str()).map_err(InvalidRequest::Host)?;
            let same = named.as_ref().is_some_and(|(host, named_port)| {
                *host == in_line.0 && named_port.unwrap_or(80) == in_line.1.unwrap_or(80)
            });
            if !same {
                return Err(InvalidRequest::HostMismatch);
            }
        }
        if let Some((_, Some(named_port))) = named
            && named_port != port
        {
            return Err(InvalidRequest::Port(named_port, port));
        }
        let path = match uri.path() {
            "*" if request.method() != Method::OPTIONS => return Err(InvalidRequest::Target),
            path => path::normalise(path)?.into_owned(),
        };
        let host_header = named.as_ref().and_then(|(host, _)| host_header(host, port));
        Ok(Self {
            host: named.and_then(|(host, _)| host.name().cloned()),
            host_header,
            method: request.method().clone(),
            path,
            query: uri.query().map(ToOwned::to_owned),
        })
    }

    /// The request in the form that was judged, without what concerns this hop alone.
    pub(crate) fn rewrite<B>(&self, request: Request<B>) -> Result<Request<B>, InvalidRequest> {
        let (mut parts, body) = request.into_parts();
        let target = match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone(),
        };
        let target: PathAndQuery = target.parse().map_err(|_| InvalidRequest::Target)?;
        parts.uri = Uri::from(target);
        parts.version = Version::HTTP_11;
        strip_hop(&mut parts.headers);
        // Answered on this hop; the body follows only after that.
        parts.headers.remove(header::EXPECT);
        parts.headers.remove(header::HOST);
        if let Some(host) = &self.host_header {
            parts.headers.insert(header::HOST, host.clone());
        }
        Ok(Request::from_parts(parts, body))
    }
}

type Named = Option<(HostOrIp, Option<u16>)>;

fn named_host<B>(request: &Request<B>) -> Result<Named, InvalidRequest> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let Some(first) = hosts.next() else {
        return if request.version() == Version::HTTP_11 {
            Err(InvalidRequest::NoHost)
        } else {
            Ok(None)
        };
    };
    if hosts.next().is_some() {
        return Err(InvalidRequest::SeveralHosts);
    }
    let text = first.to_str().map_err(|_| InvalidRequest::HostNotText)?;
    host::authority(text)
        .map(Some)
        .map_err(InvalidRequest::Host)
}

fn host_header(host: &HostOrIp, port: u16) -> Option<HeaderValue> {
    let text = if port == 80 {
        host.to_string()
    } else {
        format!("{host}:{port}")
    };
    HeaderValue::from_str(&text).ok()
}

fn nominates_upgrade(headers: &HeaderMap) -> bool {
    nominated(headers).any(|name| name == header::UPGRADE)
}

fn nominated(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> + '_ {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
}

/// Takes out what is for one hop alone: first what `Connection` names, then what always is.
pub(crate) fn strip_hop(headers: &mut HeaderMap) {
    let named: Vec<_> = nominated(headers).collect();
    for name in named {
        // A nomination must not take away what the request was judged by, or its framing.
        if name != header::HOST && name != header::CONTENT_LENGTH {
            headers.remove(name);
        }
    }
    for name in [
        header::CONNECTION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::PROXY_AUTHORIZATION,
        header::PROXY_AUTHENTICATE,
    ] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection", "http2-settings"] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    #[test]
    fn a_target_has_one_form() {
        for (uri, host, port, expected) in [
            (
                "/v1/x?q=1",
                "Partner.Example.",
                80,
                ("partner.example", "/v1/x?q=1"),
            ),
            (
                "/a/../b",
                "partner.example:80",
                80,
                ("partner.example", "/b"),
            ),
            (
                "/%41",
                "partner.example:8080",
                8080,
                ("partner.example:8080", "/A"),
            ),
            ("/", "partner.example", 8080, ("partner.example:8080", "/")),
            (
                "http://partner.example/x",
                "PARTNER.example:80",
                80,
                ("partner.example", "/x"),
            ),
        ] {
            let request = request("GET", uri, &[("host", host)]);
            let target = Target::of(&request, port).unwrap();
            assert_eq!(
                target.host,
                Some(HostName::parse("partner.example").unwrap()),
                "{host}"
            );
            let sent = target.rewrite(request).unwrap();
            assert_eq!(sent.headers()[header::HOST], expected.0, "{host}");
            assert_eq!(sent.uri().to_string(), expected.1, "{uri}");
        }
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "one table")]
    fn doubtful_targets_are_refused() {
        let host = |value| ("host", value);
        for (method, uri, headers, why) in [
            ("GET", "/", vec![], InvalidRequest::NoHost),
            (
                "GET",
                "/",
                vec![host("a.example"), host("b.example")],
                InvalidRequest::SeveralHosts,
            ),
            (
                "GET",
                "/",
                vec![host("a.example"), host("a.example")],
                InvalidRequest::SeveralHosts,
            ),
            (
                "GET",
                "/",
                vec![host("a@b.example")],
                InvalidRequest::Host(InvalidHost::UserInfo),
            ),
            (
                "GET",
                "/",
                vec![host("0x7f000001")],
                InvalidRequest::Host(InvalidHost::Address),
            ),
            (
                "GET",
                "/",
                vec![host("2130706433")],
                InvalidRequest::Host(InvalidHost::Address),
            ),
            (
                "GET",
                "/",
                vec![host("a.example:81")],
                InvalidRequest::Port(81, 80),
            ),
            (
                "GET",
                "http://b.example/",
                vec![host("a.example")],
                InvalidRequest::HostMismatch,
            ),
            (
                "GET",
                "http://a.example:81/",
                vec![host("a.example")],
                InvalidRequest::HostMismatch,
            ),
            (
                "GET",
                "https://a.example/",
                vec![host("a.example")],
                InvalidRequest::Scheme,
            ),
            (
                "GET",
                "/a%2fb",
                vec![host("a.example")],
                InvalidPath::Separator.into(),
            ),
            (
                "GET",
                "/..",
                vec![host("a.example")],
                InvalidPath::AboveRoot.into(),
            ),
            (
                "CONNECT",
                "b.example:443",
                vec![host("a.example")],
                InvalidRequest::Connect,
            ),
            (
                "GET",
                "/",
                vec![host("a.example"), ("upgrade", "h2c")],
                InvalidRequest::Upgrade,
            ),
            (
                "GET",
                "/",
                vec![host("a.example"), ("connection", "keep-alive, Upgrade")],
                InvalidRequest::Upgrade,
            ),
        ] {
            let request = request(method, uri, &headers);
            assert_eq!(
                Target::of(&request, 80),
                Err(why),
                "{method} {uri} {headers:?}"
            );
        }
    }

    #[test]
    fn an_address_is_no_name() {
        let request = request("GET", "/", &[("host", "203.0.113.9")]);
        assert_eq!(Target::of(&request, 80).unwrap().host, None);
    }

    #[test]
    fn what_connection_names_does_not_travel_on() {
        let headers = [
            ("host", "a.example"),
            ("connection", "close, x-secret, host"),
            ("x-secret", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("expect", "100-continue"),
            ("x-other", "2"),
        ];
        let request = request("GET", "/", &headers);
        let target = Target::of(&request, 80).unwrap();
        let sent = target.rewrite(request).unwrap();
        let mut names: Vec<_> = sent.headers().keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["host", "x-other"]);
    }
}
