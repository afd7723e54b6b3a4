//! Why the proxy answers in place of a server: whose fault, whether a retry is safe, which answer.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use turnpike_rules::ServiceKey;

use crate::{http::body::ResponseBody, mesh::Missing, observe::Flags};

/// The header that tells the proxy's own answers from a server's.
pub(crate) const ERROR_HEADER: HeaderName = HeaderName::from_static("x-turnpike-error");

/// The timeout that is about nothing moving.
pub(crate) const IDLE: &str = "idle";

#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("malformed request: {0}")]
    Malformed(String),
    #[error("{0}")]
    Unauthorized(String),
    #[error("no route of {service} port {port} matches this request; add a rule to an HTTPRoute")]
    NoRoute { service: ServiceKey, port: u16 },
    #[error("{route} {why}")]
    NoBackend { route: Arc<str>, why: String },
    #[error("Service {0}: {1}")]
    NoService(ServiceKey, Missing),
    #[error("{service} has no port {port}")]
    NoPort { service: ServiceKey, port: u16 },
    #[error("no endpoint of {0} is ready; see its EndpointSlices")]
    NoEndpoint(String),
    #[error("{service} is at its limit of {limit} {what}; see its TrafficPolicy, circuitBreaker")]
    Overflow {
        service: String,
        what: &'static str,
        limit: u32,
    },
    #[error("connecting to {address} failed: {reason}")]
    Connect {
        address: SocketAddr,
        reason: Arc<str>,
    },
    #[error("the request was not sent: {0}")]
    Unsent(Arc<str>),
    #[error("the server refused the stream unprocessed")]
    Refused,
    #[error("the server closed the connection before it answered: {0}")]
    Closed(Arc<str>),
    #[error("the server reset the stream: {0}")]
    Reset(Arc<str>),
    #[error("the server's answer is malformed: {0}")]
    BadAnswer(Arc<str>),
    #[error("no answer within the {what} timeout of {after:?}")]
    Timeout { what: &'static str, after: Duration },
}

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Client,
    /// A rule that somebody wrote.
    Policy,
    Upstream,
}

/// Whether the request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Retry {
    /// Provably not processed.
    Safe,
    /// May have been processed.
    IfIdempotent,
    Never,
}

impl ProxyError {
    pub(crate) fn fault(&self) -> Fault {
        match self {
            Self::Malformed(_) => Fault::Client,
            Self::Unauthorized(_)
            | Self::NoRoute { .. }
            | Self::NoBackend { .. }
            | Self::NoService(..)
            | Self::NoPort { .. }
            | Self::Overflow { .. } => Fault::Policy,
            Self::NoEndpoint(_)
            | Self::Connect { .. }
            | Self::Unsent(_)
            | Self::Refused
            | Self::Closed(_)
            | Self::Reset(_)
            | Self::BadAnswer(_)
            | Self::Timeout { .. } => Fault::Upstream,
        }
    }

    pub(crate) fn retry(&self) -> Retry {
        match self {
            Self::Connect { .. } | Self::Unsent(_) | Self::Refused => Retry::Safe,
            Self::Closed(_) | Self::Reset(_) | Self::Timeout { .. } => Retry::IfIdempotent,
            Self::Malformed(_)
            | Self::Unauthorized(_)
            | Self::NoRoute { .. }
            | Self::NoBackend { .. }
            | Self::NoService(..)
            | Self::NoPort { .. }
            | Self::NoEndpoint(_)
            | Self::Overflow { .. }
            | Self::BadAnswer(_) => Retry::Never,
        }
    }

    pub(crate) fn flags(&self) -> Flags {
        match self {
            Self::Malformed(_) => Flags::CLIENT_PROTOCOL,
            Self::Unauthorized(_) => Flags::UNAUTHORIZED,
            Self::NoRoute { .. } | Self::NoBackend { .. } | Self::NoPort { .. } => Flags::NO_ROUTE,
            Self::NoService(..) => Flags::NO_CLUSTER,
            Self::NoEndpoint(_) => Flags::NO_HEALTHY_UPSTREAM,
            Self::Overflow { .. } => Flags::OVERFLOW,
            Self::Connect { .. } => Flags::CONNECT_FAILED,
            Self::Unsent(_) | Self::Closed(_) => Flags::UPSTREAM_CLOSED,
            Self::Refused | Self::Reset(_) => Flags::UPSTREAM_RESET,
            Self::BadAnswer(_) => Flags::UPSTREAM_PROTOCOL,
            Self::Timeout { what: IDLE, .. } => Flags::IDLE,
            Self::Timeout { .. } => Flags::TIMEOUT,
        }
    }

    /// A word for machines, in [`ERROR_HEADER`].
    fn code(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::Unauthorized(_) => "unauthorized",
            Self::NoRoute { .. } => "no-route",
            Self::NoBackend { .. } => "no-backend",
            Self::NoService(..) => "no-service",
            Self::NoPort { .. } => "no-port",
            Self::NoEndpoint(_) => "no-endpoint",
            Self::Overflow { .. } => "overflow",
            Self::Connect { .. } => "connect",
            Self::Unsent(_) => "unsent",
            Self::Refused => "refused",
            Self::Closed(_) => "closed",
            Self::Reset(_) => "reset",
            Self::BadAnswer(_) => "bad-answer",
            Self::Timeout { .. } => "timeout",
        }
    }

    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::Unauthorized(_) => StatusCode::FORBIDDEN,
            // Gateway API asks for these two.
            Self::NoRoute { .. } => StatusCode::NOT_FOUND,
            Self::NoBackend { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Timeout { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::BadAnswer(_) => StatusCode::BAD_GATEWAY,
            Self::NoService(..)
            | Self::NoPort { .. }
            | Self::NoEndpoint(_)
            | Self::Overflow { .. }
            | Self::Connect { .. }
            | Self::Unsent(_)
            | Self::Refused
            | Self::Closed(_)
            | Self::Reset(_) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// gRPC's status for it (<https://github.com/grpc/grpc/blob/master/doc/statuscodes.md>).
    pub(crate) fn grpc_status(&self) -> u32 {
        match self {
            Self::Malformed(_) => 13,
            Self::Unauthorized(_) => 7,
            Self::NoRoute { .. } => 12,
            Self::Timeout { .. } => 4,
            Self::BadAnswer(_) => 13,
            _ => 14,
        }
    }

    /// Whether the connection to the client must not be used further.
    fn closes(&self) -> bool {
        matches!(self, Self::Malformed(_))
    }
}

/// An answer that a peer's proxy made before the request reached its application, so that it may
/// be sent again. Trusted only from a peer that was authenticated.
pub(crate) fn answered_unprocessed(headers: &HeaderMap) -> bool {
    let code = headers.get(&ERROR_HEADER).map(HeaderValue::as_bytes);
    matches!(code, Some(b"connect" | b"unsent" | b"refused"))
}

/// The answer to a client of the outbound side: the application in this pod, which is told all.
pub(crate) fn outbound_response(
    error: &ProxyError,
    request: RequestKind,
) -> Response<ResponseBody> {
    respond(error, request, &error.to_string())
}

/// The answer to a caller from elsewhere, who is told what was refused but not this pod's
/// addresses.
pub(crate) fn inbound_response(error: &ProxyError, request: RequestKind) -> Response<ResponseBody> {
    let text = match error {
        ProxyError::Connect { .. } => "the application does not accept connections".to_owned(),
        other => other.to_string(),
    };
    respond(error, request, &text)
}

/// What of the request shapes an error's answer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RequestKind {
    pub(crate) grpc: bool,
    pub(crate) http2: bool,
    /// It asked to leave HTTP: what its client sends next may be of another protocol.
    pub(crate) upgrade: bool,
}

fn respond(error: &ProxyError, request: RequestKind, text: &str) -> Response<ResponseBody> {
    let mut response = if request.grpc {
        grpc_response(error, text)
    } else {
        let mut response = Response::new(ResponseBody::full(format!("{text}\n").into()));
        *response.status_mut() = error.status();
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        response.headers_mut().insert(header::CONTENT_TYPE, plain);
        response
    };
    let headers = response.headers_mut();
    headers.insert(ERROR_HEADER, HeaderValue::from_static(error.code()));
    if (error.closes() || request.upgrade) && !request.http2 {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Trailers-only: gRPC's status in the head of a response without a body.
fn grpc_response(error: &ProxyError, text: &str) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    headers.insert("grpc-status", HeaderValue::from(error.grpc_status()));
    if let Ok(message) = HeaderValue::try_from(percent_encode(text)) {
        headers.insert("grpc-message", message);
    }
    response
}

/// As gRPC writes `grpc-message`: printable ASCII but `%`.
fn percent_encode(text: &str) -> String {
    use std::fmt::Write;
    text.bytes()
        .fold(String::with_capacity(text.len()), |mut encoded, byte| {
            if (b' '..=b'~').contains(&byte) && byte != b'%' {
                encoded.push(char::from(byte));
            } else {
                // Writing to a String does not fail.
                let _ = write!(encoded, "%{byte:02X}");
            }
            encoded
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_is_answered_in_its_own_terms() {
        let error = ProxyError::Timeout {
            what: "request",
            after: Duration::from_secs(1),
        };
        let request = RequestKind {
            grpc: true,
            http2: true,
            upgrade: false,
        };
        let response = outbound_response(&error, request);
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(
            response.headers()["grpc-message"],
            "no answer within the request timeout of 1s"
        );
    }

    #[test]
    fn callers_do_not_learn_addresses() {
        let address = "10.0.0.7:8080".parse().unwrap();
        let error = ProxyError::Connect {
            address,
            reason: "refused".into(),
        };
        let response = inbound_response(&error, RequestKind::default());
        assert_eq!(response.status(), 503);
        assert!(answered_unprocessed(response.headers()));
        assert_eq!(error.fault(), Fault::Upstream);
    }

    #[test]
    fn messages_are_encoded() {
        assert_eq!(percent_encode("50% é\n"), "50%25 %C3%A9%0A");
    }
}
