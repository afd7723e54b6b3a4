//! What a port speaks, as its Service declares it.

use turnpike_rules::service::Protocol;

/// Ports whose server speaks first, so that waiting for the client's bytes would only cost time.
const SERVER_FIRST: [u16; 8] = [25, 587, 3306, 4444, 5432, 6379, 9300, 11211];

/// `appProtocol` goes before the port's name (`http`, or a prefix such as `http-admin`), and that
/// before the list of server-first ports; a port that says nothing is detected.
pub(crate) fn declared(app_protocol: Option<&str>, name: &str, ports: &[u16]) -> Protocol {
    app_protocol
        .and_then(by_app_protocol)
        .or_else(|| by_name(name))
        .unwrap_or_else(|| by_port(ports))
}

/// The protocol of a port that no Service describes.
pub(crate) fn by_port(ports: &[u16]) -> Protocol {
    if ports.iter().any(|port| SERVER_FIRST.contains(port)) {
        Protocol::Tcp
    } else {
        Protocol::Detect
    }
}

/// Source: <https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol>.
fn by_app_protocol(text: &str) -> Option<Protocol> {
    let text = text.to_ascii_lowercase();
    match text.as_str() {
        "kubernetes.io/h2c" => Some(Protocol::Http2),
        "kubernetes.io/ws" => Some(Protocol::Http1),
        "kubernetes.io/wss" => Some(Protocol::Tls),
        other => known(other),
    }
}

fn by_name(name: &str) -> Option<Protocol> {
    if name.starts_with("grpc-web") {
        return Some(Protocol::Http1);
    }
    known(name.split('-').next().unwrap_or_default())
}

fn known(word: &str) -> Option<Protocol> {
    match word {
        "http" => Some(Protocol::Http1),
        "http2" | "h2c" | "grpc" => Some(Protocol::Http2),
        "https" | "tls" => Some(Protocol::Tls),
        "tcp" | "mysql" | "redis" | "mongo" | "postgres" | "postgresql" | "smtp" => {
            Some(Protocol::Tcp)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declarations_in_their_order() {
        for (app, name, ports, expected) in [
            (None, "", &[80][..], Protocol::Detect),
            (None, "http", &[80], Protocol::Http1),
            (None, "http-admin", &[80], Protocol::Http1),
            (None, "httpish", &[80], Protocol::Detect),
            (None, "grpc-api", &[80], Protocol::Http2),
            (None, "grpc-web", &[80], Protocol::Http1),
            (None, "https", &[443], Protocol::Tls),
            (None, "tcp", &[80], Protocol::Tcp),
            (None, "", &[80, 5432], Protocol::Tcp),
            (Some("http"), "tcp", &[5432], Protocol::Http1),
            (Some("kubernetes.io/h2c"), "", &[80], Protocol::Http2),
            (Some("HTTP2"), "", &[80], Protocol::Http2),
            (Some("example.com/own"), "http", &[80], Protocol::Http1),
        ] {
            assert_eq!(
                declared(app, name, ports),
                expected,
                "{app:?} {name} {ports:?}"
            );
        }
    }
}
