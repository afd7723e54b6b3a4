//! Delta ADS over real TLS, with several subscribers.
#![allow(clippy::unwrap_used, reason = "what fails here ends the test")]

mod refusals;
mod rig;
mod streams;
