//! The ports of the proxy itself: admin, metrics, readiness.
