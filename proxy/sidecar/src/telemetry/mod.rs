//! Metrics, access log and spans.
