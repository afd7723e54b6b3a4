//! The clients against a real server: gRPC over TLS on loopback, connections that break.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

mod ads;
mod ca;
mod controller;
mod resource;
