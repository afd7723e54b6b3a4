//! The limits, retries and timeouts under which requests to a Service are forwarded.

use std::time::Duration;

/// A Service's defaults, with every default filled in. A route's own timeouts and retries go
/// before these.
#[derive(Clone, Debug, PartialEq)]
pub struct TrafficPolicy {
    pub retry: Retry,
    pub timeouts: Timeouts,
    pub circuit: CircuitBreaker,
    /// `None`: endpoints are never ejected.
    pub outlier: Option<OutlierEjection>,
}

impl Default for TrafficPolicy {
    /// What holds for a Service without a TrafficPolicy: retries only of what was provably not
    /// processed, wide limits, no ejection.
    fn default() -> Self {
        Self {
            retry: Retry::default(),
            timeouts: Timeouts::default(),
            circuit: CircuitBreaker::default(),
            outlier: None,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// Tries after the first; 0 switches retries off.
    pub attempts: u32,
    pub conditions: RetryConditions,
    pub budget: RetryBudget,
    pub backoff: Backoff,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 2,
            conditions: RetryConditions::default(),
            budget: RetryBudget::default(),
            backoff: Backoff::default(),
        }
    }
}

/// When a try may be repeated. What was provably not processed (refused connection, refused
/// stream) may always be.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct RetryConditions {
    /// Response statuses, e.g. 503.
    pub statuses: Vec<u16>,
    /// The connection failed after the request was sent, or the per-try timeout passed.
    pub reset: bool,
    /// gRPC statuses (numbers), e.g. 14.
    pub grpc: Vec<u32>,
    /// Also for methods that are not idempotent (RFC 9110 §9.2.2).
    pub non_idempotent: bool,
}

/// Retries are at most `percent` of the requests of the last ten seconds, or `min_per_second`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    pub percent: f64,
    pub min_per_second: u32,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self {
            percent: 20.0,
            min_per_second: 10,
        }
    }
}

/// Exponential, fully jittered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub base: Duration,
    pub max: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(25),
            max: Duration::from_millis(250),
        }
    }
}

/// `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// Whole request, all tries.
    pub request: Option<Duration>,
    /// One try.
    pub per_try: Option<Duration>,
    /// Without a byte either way.
    pub idle: Option<Duration>,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(1),
            request: None,
            per_try: None,
            idle: Some(Duration::from_secs(3600)),
        }
    }
}

/// Over a limit, a request is answered 503 at once with the response flag `UO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CircuitBreaker {
    pub max_connections: u32,
    /// Requests that wait for a connection.
    pub max_pending: u32,
    /// Requests in flight.
    pub max_requests: u32,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            max_pending: 1024,
            max_requests: 10_000,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutlierEjection {
    /// Failures in a row (5xx, resets, timeouts) after which an endpoint is taken out.
    pub consecutive_failures: u32,
    /// First ejection; each further one is that much longer.
    pub base_ejection: Duration,
    pub max_ejection: Duration,
    /// The most endpoints out at once, in percent; at least one may always be.
    pub max_percent: u32,
}

impl Default for OutlierEjection {
    fn default() -> Self {
        Self {
            consecutive_failures: 5,
            base_ejection: Duration::from_secs(30),
            max_ejection: Duration::from_secs(300),
            max_percent: 50,
        }
    }
}
