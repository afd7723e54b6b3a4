//! The crate from outside: real certificates, real handshakes.

#![expect(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

mod authority;
mod common;
mod handshakes;
mod san;
